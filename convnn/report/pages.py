"""A report as Markdown and as one HTML file that needs nothing else. All text from runs is escaped."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from html import escape

from convnn.report.compare import Differences
from convnn.report.content import Picture, Report, Table
from convnn.report.differences import about, difference_table, matched_table, verdict
from convnn.report.results import tidy
from convnn.text import markdown_table

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #666; vertical-align: bottom; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 16rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { color: #444; font-size: .9rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .7rem; font-size: .85rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; } td { white-space: normal; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } pre { white-space: pre-wrap; }
}
"""

NOTE = "Mean ± sample standard deviation over n seeds; only complete runs count."


def markdown(report: Report) -> str:
    """Return the summary table, and the failed, open and invalid points."""
    parts = [f"# {markdown_cell(report.subject)}", f"{markdown_cell(report.counts())}. {report.shown_metric()}.", NOTE]
    parts += [markdown_table(*report.table(), markdown_cell), markdown_cell(report.follows())]
    if report.verdict:
        told = [markdown_cell(report.verdict)]
        parts += ["## Differences", *(difference_parts(report.differences) if report.differences else told)]
    for title, table in _lists(report):
        parts += [f"## {title}", markdown_table(*table, markdown_cell)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lists(report: Report) -> list[tuple[str, Table]]:
    """Return the lists below the summary that are not empty."""
    invalid = (["overrides", "reason"], [[tidy(overrides), reason] for overrides, reason in report.invalid])
    conflicts = (["of one configuration"], [[conflict] for conflict in report.conflicts])
    lists = [
        ("Two results", conflicts),
        ("Failed", report.problems()),
        ("Not finished", report.open_runs()),
        ("Not valid, never run", invalid),
    ]
    return [(title, table) for title, table in lists if table[1]]


def difference_parts(made: Differences) -> list[str]:
    """Return the tables, warnings and notes of differences in Markdown."""
    parts = [markdown_cell(verdict(made)), markdown_table(*difference_table(made), markdown_cell)]
    parts.append(markdown_cell(about(made)))
    lines = [f"- **Warning**: {markdown_cell(line)}" for line in made.warnings]
    lines += [f"- {markdown_cell(line)}" for line in made.notes]
    return [*parts, *(["\n".join(lines)] if lines else []), markdown_table(*matched_table(made), markdown_cell)]


def markdown_cell(text: str) -> str:
    """Return text that Markdown shows as it is."""
    for mark in ("\\", "|", "*", "`", "[", "]"):
        text = text.replace(mark, f"\\{mark}")
    return escape(text, quote=False)


def html_page(report: Report) -> str:
    """Return the whole report as one page: CSS and pictures inside, no script, nothing from the network."""
    parts = [
        f"<h1>{escape(report.subject)}</h1>",
        f"<p>{escape(report.counts())}. {escape(report.shown_metric())}. "
        f"Made on {time.strftime('%Y-%m-%d %H:%M')}.</p>",
        *map(_html_picture, report.pictures),
        f"<h2>Summary</h2><p>{escape(NOTE)} {escape(report.follows())}</p>{_html_table(report.table())}",
    ]
    if report.verdict:
        parts += ["<h2>Differences</h2>", f"<p>{escape(report.verdict)}</p>"]
    if report.differences is not None:
        parts += _html_differences(report.differences, report.difference_pictures)
    for title, table in _lists(report):
        parts.append(f"<h2>{title}</h2>{_html_table(table)}")
    sweeps, runs = (
        f"<pre>{escape(chr(10).join(c))}</pre>" if c else "" for c in (report.commands, report.run_commands)
    )
    if sweeps and runs:
        runs = f"<details><summary>Of each of the runs</summary>{runs}</details>"
    parts += [f"<h2>Commands</h2>{sweeps}{runs}"] * bool(sweeps or runs)
    if report.environments[1]:
        parts.append(f"<h2>Versions and hardware</h2>{_html_table(report.environments)}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.subject)}</title>
<style>{_STYLE}</style>
</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def _html_differences(made: Differences, pictures: Sequence[Picture]) -> list[str]:
    parts = [_html_table(difference_table(made)), f"<p>{escape(about(made))}</p>"]
    lines = [f"<li><strong>Warning</strong>: {escape(line)}</li>" for line in made.warnings]
    lines += [f"<li>{escape(line)}</li>" for line in made.notes]
    parts += [f"<ul>{''.join(lines)}</ul>"] * bool(lines)
    return [*parts, *map(_html_picture, pictures), _html_table(matched_table(made))]


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.svg.read_bytes()).decode()
    alt = escape(f"{picture.title}. {picture.caption}")
    image = f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(picture.title)}. {escape(picture.caption)}</figcaption></figure>"


def _html_table(table: Table) -> str:
    header, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _html_cell(text: str) -> str:
    long = ' class="long"' if len(text) > 40 else ""
    return f"<td{long}>{escape(text)}</td>"
