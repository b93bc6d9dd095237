"""The command line, ``nni-jackpot``."""

from nni_jackpot.cli.command_line import main

__all__ = ["main"]
