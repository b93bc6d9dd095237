"""Results as people read them: one screen after a search, the paper's tables and figures after many."""

from nni_jackpot.experiment.report.screen import summary
from nni_jackpot.experiment.report.write import write_report

__all__ = ["summary", "write_report"]
