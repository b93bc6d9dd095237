"""Overlap of criteria with jackpots: the paper's Fig. 3 and 4, at one sparsity.

A jackpot is searched from the mask of each criterion, and each mask is compared with each jackpot (Eq. 7).
A jackpot resembles its initial mask and has the same zeros per layer. Only the jackpot that started from a
random mask therefore compares the other criteria without bias. Two independent masks of sparsity p agree by
chance on a share of 1 - 2p(1 - p) of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prettytable import PrettyTable, TableStyle

from nni_jackpot.errors import JackpotError
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.folder.result import Result
from nni_jackpot.experiment.folder.run_folder import check_free
from nni_jackpot.experiment.report.plot import COLORS, blank
from nni_jackpot.experiment.report.wording import table_of
from nni_jackpot.experiment.run import search
from nni_jackpot.experiment.tracking import running_as_nni_trial
from nni_jackpot.masking.criteria import CRITERIA
from nni_jackpot.masks import load_masks, mask_overlap
from nni_jackpot.runtime.files import replace_files


@dataclass(frozen=True)
class Comparison:
    """The criteria side by side, in the same pre-trained network.

    Attributes
    ----------
    results
        Results of the search from each criterion's mask.
    overlaps
        ``overlaps[a][b]`` is the overlap of the mask of ``a`` with the jackpot found from ``b``, in [0, 1].
    folder
        Folder of the comparison; the searches have subfolders.
    """

    results: dict[str, Result]
    overlaps: dict[str, dict[str, float]]
    folder: Path

    @property
    def sparsity(self) -> float:
        """Sparsity of all masks."""
        return next(iter(self.results.values())).rows[-1].sparsity

    @property
    def chance(self) -> float:
        """Overlap of two independent masks of this sparsity."""
        return 1 - 2 * self.sparsity * (1 - self.sparsity)

    def table(self) -> PrettyTable:
        """Return a row for each criterion, in percent."""
        jackpots = [f"{criterion}'s" for criterion in self.overlaps]
        table = table_of(["mask", "alone", "norm re-estimated", "its jackpot", "overlap", *jackpots])
        for criterion, overlaps in self.overlaps.items():
            accuracies = [row.main for row in self.results[criterion].rows[1:]]
            values = [*accuracies, overlaps[criterion], *overlaps.values()]
            table.add_row([criterion, *(f"{100 * value:.2f}" for value in values)])
        return table

    def legend(self) -> str:
        """Return how to read the table."""
        dense = next(iter(self.results.values())).rows[0].main
        return (
            f"test accuracy % at {100 * self.sparsity:.1f} % sparsity: each criterion's mask and the jackpot "
            f"found from it; dense: {100 * dense:.2f}\n"
            "overlap %: of the mask with that jackpot, then with the jackpot found from each criterion; by "
            f"chance: {100 * self.chance:.2f}\n"
            "a jackpot resembles the mask it was found from: only random's compares the others without bias"
        )


def overlap(config: RunConfig, overwrite: bool = False) -> Comparison:
    """Search a jackpot from every criterion, each in a subfolder of the run's folder, and compare all.

    Parameters
    ----------
    config
        The run.
    overwrite
        Whether finished runs in the subfolders are replaced; if not, finished runs of the same settings are
        used.

    Raises
    ------
    JackpotError
        As `nni_jackpot.experiment.run.search` does; and in a trial of an NNI experiment.
    """
    if running_as_nni_trial():
        raise JackpotError("overlap runs several searches, but a trial of NNI has one result: use search")
    runs = {
        criterion: replace(
            config,
            output=str(Path(config.output) / f"init={criterion}"),
            search=replace(config.search, init=criterion),
            finetune=replace(config.finetune, epochs=0),
            comparators={},
        )
        for criterion in CRITERIA
    }
    for run in runs.values():  # report an occupied folder before the first search
        check_free(run, overwrite)
    results = {criterion: search(run, overwrite) for criterion, run in runs.items()}
    jackpots = {criterion: load_masks(result.folder / "masks.pth") for criterion, result in results.items()}
    overlaps = {}
    for criterion, result in results.items():
        start = load_masks(result.folder / "start.pth")
        overlaps[criterion] = {name: mask_overlap(start, found).total for name, found in jackpots.items()}
    return Comparison(results, overlaps, Path(config.output))


def save(comparison: Comparison) -> list[Path]:
    """Write ``overlap.md``, ``overlap.csv`` and, with matplotlib, ``overlap.png``; return their paths."""
    table = comparison.table()
    csv = table.get_csv_string(lineterminator="\n")
    table.set_style(TableStyle.MARKDOWN)
    markdown = f"{table.get_string()}\n\n" + comparison.legend().replace("\n", "  \n") + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        "overlap.md": lambda aside: aside.write_text(markdown, encoding="utf-8"),
        "overlap.csv": lambda aside: aside.write_text(csv, encoding="utf-8"),
    }
    if (figure := _figure(comparison)) is not None:
        writers["overlap.png"] = lambda aside: figure.savefig(aside, format="png", dpi=150)
    files = {comparison.folder / name: write for name, write in writers.items()}
    replace_files(files)
    return list(files)


def _figure(comparison: Comparison) -> Any:
    """Return a group of bars for each jackpot, a bar for each criterion's mask; None without matplotlib."""
    if (made := blank()) is None:
        return None
    figure, (axes,) = made
    names = list(comparison.overlaps)
    width = 0.8 / len(names)
    for i, (criterion, overlaps) in enumerate(comparison.overlaps.items()):
        places = [group + width * (i - (len(names) - 1) / 2) for group in range(len(names))]
        heights, color = [100 * value for value in overlaps.values()], COLORS[i % len(COLORS)]
        axes.bar(places, heights, width, color=color, label=f"{criterion} mask")
    axes.axhline(100 * comparison.chance, color="black", linestyle="--", label="by chance")
    axes.set_xticks(range(len(names)), [f"{name}'s" for name in names])
    axes.set_xlabel("jackpot")
    axes.set_ylim(100 * comparison.chance - 5, 100)
    axes.set_ylabel(f"overlap %, at {100 * comparison.sparsity:.0f} % sparsity")
    axes.legend()
    return figure
