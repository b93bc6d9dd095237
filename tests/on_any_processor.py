"""Run tests once in each setting that has PyTorch add numbers up in another way, and print a line for each.

A bound that one processor has given, or a sum that is right in one order only, fails in one of them. Run me from
the repository: python tests/on_any_processor.py [arguments of pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys

SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    # Threads that wait leave the processor to others: to those of the tests that run beside them.
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    # PyTorch's own kernels, oneDNN's and MKL's are chosen apart from each other.
    "no vector instructions": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "without oneDNN": {"JACKPOT_TEST_MKLDNN": "0"},
}


def run(setting: dict[str, str], arguments: list[str]) -> tuple[bool, str]:
    """Return whether the tests pass in a setting, and pytest's summary line."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, env={**os.environ, **setting}, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines() or [f"pytest ended with {done.returncode}"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n  ".join([lines[-1], *failed])


if __name__ == "__main__":
    passed = []
    for name, setting in SETTINGS.items():
        is_passed, said = run(setting, sys.argv[1:])
        passed.append(is_passed)
        print(f"{name}: {said}", flush=True)
    sys.exit(not all(passed))
