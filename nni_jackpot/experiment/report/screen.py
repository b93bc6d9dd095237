"""The results of a search on one screen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from prettytable import PrettyTable, TableStyle

from nni_jackpot.experiment.folder.result import Result, Row
from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.report.wording import name_of, spread


def summary(results: Sequence[Result], init: str) -> str:
    """Return the table of one run, or of several seeds: mean ± standard deviation of a sample (n - 1).

    Accuracies are percentages of the test images. Rows of text tell what each method took.

    Parameters
    ----------
    results
        Results of the runs.
    init
        Criterion of the initial masks.
    """
    measures = results[0].rows[0].values
    is_spent = any(row.tokens is not None for row in results[0].rows)
    last = ["tokens", "seconds", "peak GiB"] if is_spent else ["epochs"]
    table = PrettyTable(["", *(MEASURES[name].words for name in measures), "sparsity %", *last])
    table.set_style(TableStyle.SINGLE_BORDER)
    table.align = "r"
    table.align[""] = "l"
    for rows in zip(*(result.rows for result in results), strict=True):
        found = [MEASURES[name].spread([row.values[name] for row in rows]) for name in measures]
        name, sparsity = name_of(rows[0].kind, init), f"{100 * rows[0].sparsity:.1f}"
        table.add_row([name, *found, sparsity, *(_spent(rows) if is_spent else [rows[0].epochs])])
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


def _spent(rows: Sequence[Row]) -> list[str]:
    """Return the cells of what a method took: tokens, and the means of seconds and of memory."""
    if rows[0].tokens is None:
        return ["-", "-", "-"]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    peaks = [row.peak_memory_bytes / 2**30 for row in rows if row.peak_memory_bytes is not None]
    means = [
        f"{statistics.mean(found):.{digits}f}" if found else "-"
        for found, digits in ((seconds, 0), (peaks, 1))
    ]
    return [f"{rows[0].tokens:,}", *means]
