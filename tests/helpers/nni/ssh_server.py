"""An SSH server on this machine's loopback address, for experiments on other machines; not a test."""

from __future__ import annotations

import asyncio
import getpass
import os
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncssh


@contextmanager
def ssh_server(home: Path) -> Iterator[dict[str, Any]]:
    """Run an SSH server that accepts one new key, and yield it as an entry of NNI's ``machineList``.

    Commands run in a shell, as the user of this process. Files are copied over SFTP.

    Parameters
    ----------
    home
        A new folder for the key, and the home folder of the commands.
    """
    home.mkdir(mode=0o700)
    key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
    key.write_private_key(home / "key", "pkcs1-pem")  # NNI 3.0 reads keys of this format only
    # NNI upgrades itself on the machine with pip: without an index, pip leaves the environment as it is.
    environment = os.environ | {"HOME": str(home), "PIP_NO_INDEX": "1"}

    async def execute(process: asyncssh.SSHServerProcess[bytes]) -> None:
        shell = await asyncio.create_subprocess_shell(
            process.command or "", env=environment, cwd=home, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
        )
        stdout, stderr = await shell.communicate()
        process.stdout.write(stdout)
        process.stderr.write(stderr)
        process.exit(await shell.wait())

    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with asyncssh.listen(
            "127.0.0.1",
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=asyncssh.import_authorized_keys(key.export_public_key().decode()),
            process_factory=execute,
            sftp_factory=True,
            encoding=None,
        ) as server:
            started.set_result((server.get_port(), asyncio.get_running_loop(), stop))
            await stop.wait()

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(lambda: asyncio.run(serve()))
        running.add_done_callback(lambda ended: started.done() or started.set_exception(ended.exception()))
        port, loop, stop = started.result()
        try:
            yield {
                "host": "127.0.0.1",
                "port": port,
                "user": getpass.getuser(),
                "sshKeyFile": str(home / "key"),
            }
        finally:
            loop.call_soon_threadsafe(stop.set)
            running.result()
