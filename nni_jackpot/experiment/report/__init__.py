"""Reports of results: one screen after a search, and the paper's tables and figures over many runs."""

from nni_jackpot.experiment.report.screen import summary
from nni_jackpot.experiment.report.write import write_report

__all__ = ["summary", "write_report"]
