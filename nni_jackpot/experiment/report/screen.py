"""The results of a search on one screen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from prettytable import PrettyTable, TableStyle

from nni_jackpot.experiment.folder.result import Result
from nni_jackpot.experiment.report.wording import name_of, spread


def summary(results: Sequence[Result], init: str) -> str:
    """Return the table of one run, or of several seeds: mean ± standard deviation.

    Accuracies are percentages of the test images; the deviation is that of a sample (n - 1).

    Parameters
    ----------
    results
        Results of the runs.
    init
        Criterion of the initial masks.
    """
    table = PrettyTable(["", "test accuracy %", "sparsity %", "epochs"])
    table.set_style(TableStyle.SINGLE_BORDER)
    table.align = "r"
    table.align[""] = "l"
    for rows in zip(*(result.rows for result in results), strict=True):
        accuracy = spread([row.accuracy for row in rows])
        name, sparsity = name_of(rows[0].kind, init), f"{100 * rows[0].sparsity:.1f}"
        table.add_row([name, accuracy, sparsity, rows[0].epochs])
    overlap = spread([result.overlap for result in results])
    seconds = statistics.mean(result.seconds for result in results)
    runs = "" if len(results) == 1 else f" a run, {len(results)} runs"
    if any(result.resumed_step for result in results):
        runs += ", resumed at step " + ", ".join(str(result.resumed_step) for result in results)
    return "\n".join(
        [
            table.get_string(),
            f"overlap of the jackpot with its initial mask: {overlap} %; search: {seconds:.1f} s{runs}",
            "no weight was changed: every parameter is bit for bit the checkpoint's",
            *(f"written to {result.folder}" for result in results),
        ]
    )
