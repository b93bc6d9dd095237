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

Drawn = tuple[Figure, dict[str, bytes] | None]
"""A figure and its files by suffix, ``png`` and ``svg``; None if it could not be drawn."""


@dataclass(frozen=True)
class Section:
    """Tables and figures of one network on one data set.

    Attributes
    ----------
    title, slug
        Title, and its form in file names.
    lead
        What was found, in a sentence; may be empty.
    picture
        The figure after it, with its files; None if there is none.
    tables
        In order.
    figures
        In order.
    """

    title: str
    slug: str
    lead: str
    picture: Drawn | None
    tables: list[Table]
    figures: list[Drawn]

    @property
    def drawn(self) -> list[Drawn]:
        """All figures."""
        return [*([] if self.picture is None else [self.picture]), *self.figures]


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
    lines = [f"# {_TITLE}"]
    for section in report.sections:
        lines += [f"## {section.title}", *([_plain(section.lead)] if section.lead else [])]
        if section.picture is not None:
            lines += _figure(section, section.picture)
        for table in section.tables:
            cells = _pretty(table, _plain, "[{0}](#run-{0})").get_string()
            lines += [f"### {table.title}", cells, f"{table.note} [CSV]({section.slug}-{table.name}.csv)"]
        for drawn in section.figures:
            lines += _figure(section, drawn)
    fence = _fence(report.command, 3)
    lines += ["## Runs", _ABOUT, f"{fence}bash\n{report.command}\n{fence}"]
    lines.append(
        "\n".join(
            f'{run.number}. <a id="run-{run.number}"></a>{_code(run.command)} {_plain(run.origin)}'.rstrip()
            for run in report.found.runs
        )
    )
    if report.found.skipped:
        lines += [
            "Passed over:",
            "\n".join(
                f"- {_code(str(folder))}: {_plain(why)}" for folder, why in report.found.skipped.items()
            ),
        ]
    return "\n\n".join(lines) + "\n"


def _figure(section: Section, drawn: Drawn) -> list[str]:
    figure, files = drawn
    stem = f"{section.slug}-{figure.name}"
    picture = [f"![{figure.title}]({stem}.svg)"] if files else []
    links = [f"[CSV]({stem}.csv)", *([f"[PNG]({stem}.png)"] if files else [])]
    return [f"### {figure.title}", *picture, " ".join([figure.note, *links]).strip()]


def page(report: Report) -> str:
    """Return the report as one HTML file, with links to the CSV files beside it."""
    parts = [f"<h1>{_TITLE}</h1>"]
    for section in report.sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f'<p class="lead">{html.escape(section.lead)}</p>'] if section.lead else []
        if section.picture is not None:
            parts += _shown(section, section.picture)
        for table in section.tables:
            cells = _pretty(table, html.escape, '<a href="#run-{0}">{0}</a>')
            parts.append(f"<h3>{table.title}</h3>")
            parts.append(f'<div class="wide">{cells.get_html_string(escape_data=False)}</div>')
            parts.append(f'<p>{table.note} <a href="{section.slug}-{table.name}.csv">CSV</a></p>')
        for drawn in section.figures:
            parts += _shown(section, drawn)
    parts += ["<h2>Runs</h2>", f"<p>{_ABOUT}</p>", f"<pre>{html.escape(report.command)}</pre>", "<ol>"]
    for run in report.found.runs:
        text = f"<code>{html.escape(run.command)}</code> {html.escape(run.origin)}"
        parts.append(f'<li id="run-{run.number}">{text}</li>')
    parts.append("</ol>")
    if report.found.skipped:
        lines = [html.escape(f"{folder}: {why}") for folder, why in report.found.skipped.items()]
        skipped = [f"<li>{line}</li>" for line in lines]
        parts += ["<p>Passed over:</p>", "<ul>", *skipped, "</ul>"]
    return _PAGE.format(title=_TITLE, style=_STYLE, body="\n".join(parts))


def _shown(section: Section, drawn: Drawn) -> list[str]:
    figure, files = drawn
    stem = f"{section.slug}-{figure.name}"
    svg = _inline(files["svg"].decode(), stem, figure.title) if files else ""
    return [
        f"<h3>{figure.title}</h3>",
        *([f'<div class="wide">{svg}</div>'] if files else []),
        f'<p>{figure.note} <a href="{stem}.csv">CSV</a></p>',
    ]


def _plain(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return html.escape(text, quote=False).replace("|", "\\|")


def _code(text: str) -> str:
    fence = _fence(text, 1)
    return f"{fence}{text}{fence}"


def _fence(text: str, least: int) -> str:
    """Return more backticks than the longest run of them in a text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _pretty(table: Table, shown: Callable[[str], str], link: str) -> PrettyTable:
    """Return a table of escaped cells; the last column, of numbers of runs, links to the list of runs."""
    pretty = PrettyTable(table.columns)
    for *cells, runs in table.rows:
        linked = re.sub(r"\d+", lambda number: link.format(number[0]), runs)
        pretty.add_row([*map(shown, cells), linked])
    pretty.set_style(TableStyle.MARKDOWN)
    pretty.align = "r"
    pretty.align[table.columns[0]] = "l"
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
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas }
.lead { font-size: 1.15rem }
svg { width: 100%; min-width: 40rem; height: auto }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal } }
@media (prefers-color-scheme: dark) { svg { filter: invert(.88) hue-rotate(180deg) } }
"""
