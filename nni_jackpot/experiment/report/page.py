"""A report as a page: Markdown for a repository, and one self-contained HTML file."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass

from prettytable import PrettyTable, TableStyle

from nni_jackpot.experiment.report.figures import Figure
from nni_jackpot.experiment.report.runs import Found
from nni_jackpot.experiment.report.tables import Table
from nni_jackpot.experiment.report.wording import table_of


@dataclass(frozen=True)
class Section:
    """Tables and figures of one network on one data set.

    Attributes
    ----------
    title, slug
        Title, and its form in file names.
    tables
        In order.
    figures
        In order, with their files by suffix, ``png`` and ``svg``; None if they could not be drawn.
    """

    title: str
    slug: str
    tables: list[Table]
    figures: list[tuple[Figure, dict[str, bytes] | None]]


@dataclass(frozen=True)
class Report:
    """The report on a set of runs.

    Attributes
    ----------
    command
        The command that made the report.
    found
        The runs.
    sections
        One per network and data set.
    """

    command: str
    found: Found
    sections: list[Section]


_TITLE = "Lottery jackpots: results"
_ABOUT = (
    "Accuracies are percentages of the test images: the mean over seeds ± the standard deviation of a sample"
    " (n - 1), or the value of a single run. The paper's numbers stand beside ours where dataset, network,"
    " sparsity and epochs are the same. Bands in figures are one standard deviation to both sides. The CSV"
    " files have every number, with its settings and commands."
)


def markdown(report: Report) -> str:
    """Return the report as Markdown, with links to the other files."""
    fence = _fence(report.command, 3)
    lines = [f"# {_TITLE}", f"{fence}bash\n{report.command}\n{fence}", _ABOUT]
    for section in report.sections:
        lines.append(f"## {section.title}")
        for table in section.tables:
            file = f"{section.slug}-{table.name}.csv"
            lines += [
                f"### {table.title}",
                _pretty(table, _plain).get_string(),
                f"{table.note} [CSV]({file})",
            ]
        for figure, files in section.figures:
            stem = f"{section.slug}-{figure.name}"
            lines.append(f"### {figure.title}")
            lines += [f"![{figure.title}]({stem}.svg)"] if files else []
            links = [f"[PNG]({stem}.png)"] if files else []
            lines.append(" ".join([figure.note, f"[CSV]({stem}.csv)", *links]).strip())
    runs = [f"{run.number}. {_code(run.command)} {_plain(run.origin)}".rstrip() for run in report.found.runs]
    lines += ["## Runs", "\n".join(runs)]
    if report.found.skipped:
        lines += [
            "Passed over:",
            "\n".join(
                f"- {_code(str(folder))}: {_plain(why)}" for folder, why in report.found.skipped.items()
            ),
        ]
    return "\n\n".join(lines) + "\n"


def page(report: Report) -> str:
    """Return the report as one HTML file, with links to the CSV files beside it."""
    parts = [f"<h1>{_TITLE}</h1>", f"<pre>{html.escape(report.command)}</pre>", f"<p>{_ABOUT}</p>"]
    for section in report.sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for table in section.tables:
            parts.append(f"<h3>{table.title}</h3>")
            parts.append(f'<div class="wide">{_pretty(table).get_html_string()}</div>')
            parts.append(f'<p>{table.note} <a href="{section.slug}-{table.name}.csv">CSV</a></p>')
        for figure, files in section.figures:
            stem = f"{section.slug}-{figure.name}"
            parts.append(f"<h3>{figure.title}</h3>")
            if files:
                parts.append(f'<div class="wide">{_inline(files["svg"].decode(), stem, figure.title)}</div>')
            parts.append(f'<p>{figure.note} <a href="{stem}.csv">CSV</a></p>')
    runs = [f"<code>{html.escape(run.command)}</code> {html.escape(run.origin)}" for run in report.found.runs]
    parts += ["<h2>Runs</h2>", "<ol>", *(f"<li>{text}</li>" for text in runs), "</ol>"]
    if report.found.skipped:
        lines = [html.escape(f"{folder}: {why}") for folder, why in report.found.skipped.items()]
        skipped = [f"<li>{line}</li>" for line in lines]
        parts += ["<p>Passed over:</p>", "<ul>", *skipped, "</ul>"]
    return _PAGE.format(title=_TITLE, style=_STYLE, body="\n".join(parts))


def _plain(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return html.escape(text, quote=False).replace("|", "\\|")


def _code(text: str) -> str:
    fence = _fence(text, 1)
    return f"{fence}{text}{fence}"


def _fence(text: str, least: int) -> str:
    """Return more backticks than the longest run of them in a text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _pretty(table: Table, shown: Callable[[str], str] = str) -> PrettyTable:
    pretty = table_of(table.columns, TableStyle.MARKDOWN)
    pretty.add_rows([[shown(cell) for cell in row] for row in table.rows])
    return pretty


def _inline(svg: str, name: str, title: str) -> str:
    """Return an SVG file as part of a page, with unique ids."""
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

# In dark mode, plots are inverted with their hues preserved.
_STYLE = """
:root { color-scheme: light dark }
body { max-width: 76rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif }
pre, .wide { overflow-x: auto }
code { overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8886 }
th:first-child, td:first-child { text-align: left }
svg { width: 100%; min-width: 40rem; height: auto }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal } }
@media (prefers-color-scheme: dark) { svg { filter: invert(.88) hue-rotate(180deg) } }
"""
