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
from nni_jackpot.experiment.report.lead.picture import picture
from nni_jackpot.experiment.report.lead.sentence import sentence
from nni_jackpot.experiment.report.measures import Measure, measure
from nni_jackpot.experiment.report.page import Report, Section, markdown, page
from nni_jackpot.experiment.report.runs import Found, find_runs
from nni_jackpot.experiment.report.tables import tables
from nni_jackpot.runtime.extras import install_command
from nni_jackpot.runtime.files import check_folder, replace_files
from nni_jackpot.runtime.terminal import encodable

_LONGEST = 100  # characters of a section's name in file names
_SCREEN = 12  # lines about skipped runs


def write_report(paths: Sequence[Path], folder: Path) -> str:
    """Write the paper's tables and figures, of finished runs, and a page with them all.

    Parameters
    ----------
    paths
        Folders of runs, sweeps or NNI experiments; all runs in and below them are read.
    folder
        Folder of ``index.html``, ``report.md``, a CSV file per table and figure and, with matplotlib, each
        figure as PNG and SVG. The same runs make the same files, byte by byte.

    Returns
    -------
    str
        One screen: what was read, skipped and written.

    Raises
    ------
    RunFolderError
        If a path has no finished run in or below it, or a file of a run is damaged.
    ExperimentConfigError, CheckpointError
        If a run's ``config.yml``, or a file of masks, is damaged.
    OutputFolderError
        If a file cannot be written; the files of an earlier report are then unchanged.
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
    """Return the measures by network and data set."""
    sections: dict[str, list[Measure]] = defaultdict(list)
    for one in measure(found.runs):
        sections[f"{one.network} on {one.data}"].append(one)
    return dict(sorted(sections.items()))


def slugs(titles: Sequence[str]) -> dict[str, str]:
    """Return the beginnings of file names, one per title; equal or long ones get a digest."""
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
    first = picture(measures)
    lead = None if first is None else (first, plot.draw(first))
    return Section(title, slug, sentence(measures), lead, tables(measures), drawn)


def _read(found: Found) -> list[str]:
    lines = [f"  {path}: {why}" for path, why in found.skipped.items()]
    head = f"read {len(found.runs)} runs, passed over {len(lines)}"
    if len(lines) > _SCREEN:
        lines = [*lines[:_SCREEN], f"  and {len(lines) - _SCREEN} more, see report.md"]
    return [head, *lines]


def _written(report: Report, folder: Path) -> list[str]:
    tables = sum(len(section.tables) for section in report.sections)
    drawn = [files for section in report.sections for _, files in section.drawn]
    forms = "CSV, PNG, SVG" if all(drawn) else "CSV"
    files = f"index.html, report.md, tables: {tables} (CSV), figures: {len(drawn)} ({forms})"
    missing = [] if all(drawn) else [f"figures need matplotlib: {install_command('plot')}"]
    return [f"written to {folder}: {files}", *missing]


def _files(report: Report) -> dict[str, bytes]:
    """Return the content of all files by name."""
    texts = {"index.html": page(report), "report.md": markdown(report)}
    images: dict[str, bytes] = {}
    for section in report.sections:
        for table in section.tables:
            texts[f"{section.slug}-{table.name}.csv"] = records.of_measures(table.measures)
        for figure, drawn in section.drawn:
            stem = f"{section.slug}-{figure.name}"
            texts[f"{stem}.csv"] = records.of_figure(figure)
            images |= {f"{stem}.{suffix}": data for suffix, data in (drawn or {}).items()}
    return {name: encodable(text).encode() for name, text in texts.items()} | images
