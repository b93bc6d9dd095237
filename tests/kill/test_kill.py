"""A small campaign: nothing is lost or mixed, whenever a process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.honours("resume")
def test_nothing_is_lost_and_nothing_is_mixed() -> None:
    command = [sys.executable, str(Path(__file__).with_name("campaign.py")), "--small"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert " 0 differences; 10 rounds of two processes, 0 mixed." in process.stdout
