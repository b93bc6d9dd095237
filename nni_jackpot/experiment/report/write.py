"""From the folders of runs to the files of a report."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nni_jackpot.experiment.report import plot, records
from nni_jackpot.experiment.report.figures import figures
from nni_jackpot.experiment.report.measures import Measure, measure
from nni_jackpot.experiment.report.page import Report, Section, markdown, page
from nni_jackpot.experiment.report.runs import Found, find_runs
from nni_jackpot.experiment.report.tables import tables
from nni_jackpot.runtime.files import check_folder, replace_files
from nni_jackpot.runtime.terminal import encodable

_LONGEST = 100  # of the part of a file's name that says what a section is about
_SCREEN = 12  # lines about runs that were passed over


def write_report(paths: Sequence[Path], folder: Path) -> str:
    """Write the paper's tables and figures, of finished runs, and a page with them all.

    Parameters
    ----------
    paths
        Folders of runs, of sweeps or of NNI experiments; all runs in and below them are read.
    folder
        Gets ``index.html``, ``report.md``, a CSV file for each table and figure and, with matplotlib, each
        figure as PNG and SVG. The same runs make the same files, byte by byte.

    Returns
    -------
    str
        What was read, passed over and written: one screen.

    Raises
    ------
    RunFolderError
        If there is no finished run in or below one of the paths, or one of its files is damaged.
    ExperimentConfigError, CheckpointError
        If a run's ``config.yml``, or a file of masks, is.
    OutputFolderError
        If a file cannot be written; the files of an earlier report are then as they were.
    """
    check_folder(folder)
    found = find_runs(paths)
    command = shlex.join(["nni-jackpot", "report", *map(str, paths), "-o", str(folder)])
    networks = _by_network(found)
    names = slugs(list(networks))
    report = Report(command, found, [_section(title, names[title], own) for title, own in networks.items()])
    files = _files(report)
    replace_files({folder / name: partial(Path.write_bytes, data=content) for name, content in files.items()})
    return "\n".join([*_read(found), *_written(report, folder)])


def _by_network(found: Found) -> dict[str, list[Measure]]:
    """Return what was measured, by the network and the dataset."""
    sections: dict[str, list[Measure]] = defaultdict(list)
    for one in measure(found.runs):
        sections[f"{one.network} on {one.data}"].append(one)
    return dict(sorted(sections.items()))


def slugs(titles: Sequence[str]) -> dict[str, str]:
    """Return beginnings of names of files, one for each title; those that would be the same have a digest."""
    plain = {title: re.sub(r"[^a-z0-9]+", "-", title.lower()) for title in titles}
    known = list(plain.values())
    return {
        title: slug
        if known.count(slug) == 1 and len(slug) <= _LONGEST
        else f"{slug[:_LONGEST]}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"
        for title, slug in plain.items()
    }


def _section(title: str, slug: str, measures: Sequence[Measure]) -> Section:
    drawn = [(figure, plot.draw(figure)) for figure in figures(measures)]
    return Section(title, slug, tables(measures), drawn)


def _read(found: Found) -> list[str]:
    lines = [f"  {path}: {why}" for path, why in found.skipped.items()]
    more = [f"  and {len(lines) - _SCREEN} more, see report.md"] if len(lines) > _SCREEN else []
    return [f"read {len(found.runs)} runs, passed over {len(lines)}", *lines[:_SCREEN], *more]


def _written(report: Report, folder: Path) -> list[str]:
    tables = sum(len(section.tables) for section in report.sections)
    drawn = [files for section in report.sections for _, files in section.figures]
    forms = "CSV, PNG, SVG" if all(drawn) else "CSV"
    files = f"index.html, report.md, tables: {tables} (CSV), figures: {len(drawn)} ({forms})"
    return [f"written to {folder}: {files}", *([] if all(drawn) else [plot.MISSING])]


def _files(report: Report) -> dict[str, bytes]:
    """Return the content of all files by their name."""
    texts = {"index.html": page(report), "report.md": markdown(report)}
    images: dict[str, bytes] = {}
    for section in report.sections:
        for table in section.tables:
            texts[f"{section.slug}-{table.name}.csv"] = records.of_measures(table.measures)
        for figure, drawn in section.figures:
            stem = f"{section.slug}-{figure.name}"
            texts[f"{stem}.csv"] = records.of_figure(figure)
            images |= {f"{stem}.{suffix}": data for suffix, data in (drawn or {}).items()}
    return {name: encodable(text).encode() for name, text in texts.items()} | images
