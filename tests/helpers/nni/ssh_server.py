"""An SSH server on this machine's loopback address, for experiments on other machines; not a test."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Debian and its kin keep the server where only root's PATH looks.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


@contextmanager
def ssh_server(folder: Path) -> Iterator[dict[str, Any]]:
    """Run an SSH server that accepts one new key, and yield it as an entry of NNI's ``machineList``.

    Skip the test where OpenSSH's server is not installed, or the user may not run it.

    Parameters
    ----------
    folder
        Where keys and settings are written.
    """
    server = shutil.which("sshd", path=_PATH)
    if server is None:
        pytest.skip("no sshd: apt-get install openssh-server")
    folder.mkdir(mode=0o700)
    for key in ("host", "client"):
        # NNI 3.0 reads keys of this format only.
        command = [
            "ssh-keygen",
            "-q",
            "-t",
            "rsa",
            "-b",
            "2048",
            "-m",
            "PEM",
            "-N",
            "",
            "-f",
            str(folder / key),
        ]
        subprocess.run(command, check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "client.pub",
        "PasswordAuthentication": "no",
        "StrictModes": "no",  # the folder of a test may be writable by its group
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
        "SetEnv": f"HOME={folder}",  # NNI writes below the home folder
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of Debian separates privileges
    process = subprocess.Popen([server, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "log")])
    try:
        if not _listens(port, process):
            pytest.skip(f"sshd does not start: {(folder / 'log').read_text()}")
        yield {
            "host": "127.0.0.1",
            "port": port,
            "user": getpass.getuser(),
            "sshKeyFile": str(folder / "client"),
        }
    finally:
        process.terminate()
        process.wait()


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    while process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.1)
    return False
