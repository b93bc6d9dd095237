"""Run a real NNI experiment on this machine and read its trials; not a test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Trial:
    """One trial of an experiment, with the metrics it reported."""

    number: int
    id: str
    status: str
    parameters: dict[str, Any]
    intermediate: list[dict[str, float]]
    final: dict[str, float] | None


def run_experiment(
    config_path: Path, workdir: Path, port: int | None = None, *, timeout_s: float
) -> list[Trial]:
    """Run the experiment of an NNI configuration file to its end.

    Parameters
    ----------
    config_path
        The YAML file for ``nnictl create``. Its ``trialCommand`` finds this interpreter's scripts.
    workdir
        Home folder of NNI for this run: ``nni-experiments`` lies below it unless the configuration says otherwise.
    port
        Port of NNI's REST API; a free one if None.
    timeout_s
        Seconds until the experiment, once started, has to be done.

    Returns
    -------
    list[Trial]
        The trials in the order in which NNI started them. The output of those that did not succeed is printed.

    Raises
    ------
    RuntimeError
        ``nnictl create`` failed, or the experiment ended in the status ERROR.
    TimeoutError
        The experiment was not done in time.
    """
    port = port or _free_port()
    # nnictl lists experiments below the home folder whatever the configuration says; trials find their
    # interpreter on the PATH, and nnictl, even if started by its full path, does not add its own folder.
    workdir.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "HOME": str(workdir.resolve()),
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
    }
    try:
        created = _nnictl(
            "create", "--config", str(config_path), "--port", str(port), environment=environment
        )
        if created.returncode != 0:
            raise RuntimeError(f"nnictl create failed:\n{created.stdout}")
        _wait_until_done(port, timeout_s)
        return _read_trials(port)
    finally:
        _nnictl("stop", "--port", str(port), environment=environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _nnictl(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "nnictl"), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def _get(port: int, path: str) -> Any:
    response = requests.get(f"http://127.0.0.1:{port}/api/v1/nni/{path}", timeout=30)
    response.raise_for_status()
    return response.json()


def _wait_until_done(port: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while (state := _get(port, "check-status"))["status"] != "DONE":
        if state["status"] == "ERROR":
            raise RuntimeError(f"the experiment failed: {state['errors']}")
        if time.monotonic() > deadline:
            _read_trials(port)
            raise TimeoutError(f"the experiment is {state['status']} after {timeout_s} s")
        time.sleep(0.5)


def _read_trials(port: int) -> list[Trial]:
    jobs = sorted(_get(port, "trial-jobs"), key=lambda job: job["sequenceId"])
    metrics = sorted(_get(port, "metric-data"), key=lambda metric: metric["sequence"])
    records = {job["trialJobId"]: json.loads(job["hyperParameters"][-1]) for job in jobs}
    parameters = {str(record["parameter_id"]): record["parameters"] for record in records.values()}
    trials = []
    for job in jobs:
        own = [metric for metric in metrics if metric["trialJobId"] == job["trialJobId"]]
        # Of trials that run side by side NNI 3.0 hands the parameters to whichever asks first, and still
        # lists them with the trial they were meant for: only a metric says what its trial was given.
        used = own[0]["parameterId"] if own else str(records[job["trialJobId"]]["parameter_id"])
        finals = [_value(metric) for metric in own if metric["type"] == "FINAL"]
        trials.append(
            Trial(
                number=job["sequenceId"],
                id=job["trialJobId"],
                status=job["status"],
                parameters=parameters[used],
                intermediate=[_value(metric) for metric in own if metric["type"] == "PERIODICAL"],
                final=finals[-1] if finals else None,
            )
        )
        if job["status"] != "SUCCEEDED":
            _print_output(job)
    return trials


def _value(metric: dict[str, Any]) -> dict[str, float]:
    value: dict[str, float] = json.loads(json.loads(metric["data"]))
    return value


def _print_output(job: dict[str, Any]) -> None:
    for name in ("trial.log", "trial.stdout", "trial.stderr"):
        path = Path(job.get("logPath", "")) / name
        if path.is_file():
            print(f"--- {job['trialJobId']} ({job['status']}) {name}\n{path.read_text()[-5000:]}")
