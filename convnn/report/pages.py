"""A report as Markdown and as one HTML file that needs nothing else. All text from runs is escaped."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from convnn.report.answer import Answer, answer_of
from convnn.report.compare import Differences
from convnn.report.content import Picture, Report, Section, Table
from convnn.report.differences import about, difference_table, matched_table, verdict
from convnn.report.results import tidy
from convnn.text import markdown_table

_POLICY = (
    "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; "
    "form-action 'none'"
)
"""What a browser may load and run: pictures that are in the page, and the page's own style and script."""

_NUMBER = re.compile(r"[<>+-]? ?\d")
MAX_CAUTIONS = 3
"""Warnings that stand beside the answer; all are with the differences."""
_WIDE = 800
"""Points of width from which on a picture has two panels side by side."""

NOTE = "Mean ± sample standard deviation over n seeds; only complete runs count."


def markdown(report: Report) -> str:
    """Return the summary table, and the failed, open and invalid points."""
    answer = answer_of(report)
    parts = [
        f"# {markdown_cell(report.subject)}",
        f"**{markdown_cell(answer.headline)}.** {markdown_cell(answer.text)}",
    ]
    parts += [f"{markdown_cell(report.counts())}. {report.shown_metric()}.", NOTE]
    parts += [markdown_table(*report.table(), markdown_cell), markdown_cell(report.follows())]
    if report.verdict:
        told = [markdown_cell(report.verdict)]
        parts += ["## Differences", *(difference_parts(report.differences) if report.differences else told)]
    for section in report.sections:
        parts += [f"## {markdown_cell(section.title)}", markdown_cell(section.text)]
        parts += [markdown_table(*table, markdown_cell) for table in section.tables]
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
    """Return the whole report as one page: style, script and pictures inside, nothing from the network."""
    style, script = ((files("convnn.report") / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = _html_sections(report)
    links = "\n".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, _ in sections)
    body = "\n".join(
        f'<section id="{_anchor(title)}">\n<h2>{escape(title)}</h2>\n{"".join(parts)}\n</section>'
        for title, parts in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY.format(_digest(style), _digest(script))}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.subject)}</title>
<style>{style}</style>
</head>
<body>
<header>
<div><h1>{escape(report.subject)}</h1>
<p>{escape(report.counts())}. {escape(report.shown_metric())}. Made on {time.strftime("%Y-%m-%d %H:%M")}.</p></div>
</header>
<main>
{_html_answer(answer_of(report))}
<nav>{links}</nav>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _html_sections(report: Report) -> list[tuple[str, list[str]]]:
    """Return the titles of the sections below the answer, and what they hold."""
    sections: list[tuple[str, list[str]]] = []
    if report.verdict:
        sections.append(("Differences", [_text(report.verdict)]))
    if report.differences is not None:
        sections[-1][1].extend(_html_differences(report.differences, report.difference_pictures))
    sections.append(("Summary", [_text(f"{NOTE} {report.follows()}"), _html_table(report.table())]))
    if report.pictures:
        sections.append(("Pictures", list(map(_html_picture, report.pictures))))
    sections += [(section.title, _html_section(section)) for section in report.sections]
    sections += [(title, [_html_table(table)]) for title, table in _lists(report)]
    sweeps, runs = (
        f"<pre>{escape(chr(10).join(c))}</pre>" if c else "" for c in (report.commands, report.run_commands)
    )
    if sweeps and runs:
        runs = f"<details><summary>Of each of the runs</summary>{runs}</details>"
    sections += [("Commands", [sweeps, runs])] * bool(sweeps or runs)
    sections += [("Versions and hardware", [_html_table(report.environments)])] * bool(report.environments[1])
    return sections


def _html_section(section: Section) -> list[str]:
    text = [_text(section.text)] if section.text else []
    return [*text, *map(_html_picture, section.pictures), *map(_html_table, section.tables)]


def _text(text: str) -> str:
    return f"<p>{escape(text.strip())}</p>"


def _html_answer(answer: Answer) -> str:
    facts = "\n".join(
        f"<div><dt>{escape(fact.question)}</dt><dd>{escape(fact.answer)}</dd><dd>{escape(fact.note)}</dd></div>"
        for fact in answer.facts
    )
    parts = [f"<h2>{escape(answer.headline)}</h2>", _text(answer.text), f'<dl class="facts">\n{facts}\n</dl>']
    lines = [f"<li>{escape(line)}</li>" for line in answer.cautions[:MAX_CAUTIONS]]
    if len(answer.cautions) > MAX_CAUTIONS:
        lines.append(f"<li>{len(answer.cautions) - MAX_CAUTIONS} more warnings below</li>")
    parts += [f'<ul class="cautions">{"".join(lines)}</ul>'] * bool(lines)
    parts += [_html_table((answer.cost_header, answer.costs))] * bool(answer.costs)
    return f'<section id="answer">\n{chr(10).join(parts)}\n</section>'


def _html_differences(made: Differences, pictures: Sequence[Picture]) -> list[str]:
    drawn = list(map(_html_picture, pictures))
    parts = [*drawn[:1], _html_table(difference_table(made)), _text(about(made))]
    lines = [f"<li><strong>Warning</strong>: {escape(line)}</li>" for line in made.warnings]
    lines += [f"<li>{escape(line)}</li>" for line in made.notes]
    parts += [f"<ul>{''.join(lines)}</ul>"] * bool(lines)
    return [*parts, *drawn[1:], _html_table(matched_table(made))]


def _html_picture(picture: Picture) -> str:
    content = picture.svg.read_bytes()
    alt = escape(f"{picture.title}. {picture.caption}")
    drawn = "" if b"<image" in content else ' class="drawn"'  # what holds photographs keeps its colours in the dark
    image = f'<img{drawn} alt="{alt}" src="data:image/svg+xml;base64,{base64.b64encode(content).decode()}">'
    width, height = _size_of(content)
    places = [(f'cx="{hint.x * width:.1f}" cy="{hint.y * height:.1f}"', hint.text) for hint in picture.hints]
    points = "".join(f'<circle {place} r="7"><title>{escape(text)}</title></circle>' for place, text in places)
    layer = f'<svg viewBox="0 0 {width:g} {height:g}" role="group" aria-label="Points">{points}</svg>' if points else ""
    plot = f'<div class="plot{" wide" * (width > _WIDE)}">{image}{layer}</div>'
    caption = f"<figcaption>{escape(picture.title)}. {escape(picture.caption)}</figcaption>"
    return f'<figure><div class="across">{plot}</div>{caption}</figure>\n'


def _size_of(svg: bytes) -> tuple[float, float]:
    """Return the width and height that the coordinates in an SVG file are of."""
    found = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    return (float(found[1]), float(found[2])) if found else (1.0, 1.0)


def _html_table(table: Table) -> str:
    header, rows = table
    numbers = [all(_NUMBER.match(cell) or cell in ("–", "") for cell in column) for column in zip(*rows, strict=True)]
    numbers = numbers or [False] * len(header)
    head = "".join(_html_cell("th", cell, number) for cell, number in zip(header, numbers, strict=True))
    lines = ("".join(_html_cell("td", *pair) for pair in zip(row, numbers, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"""<div class="scroll" role="region" aria-label="Table" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>\n{body}</tbody></table></div>"""


def _html_cell(kind: str, text: str, number: bool) -> str:
    names = ["number"] * number + ["long"] * (len(text) > (40 if kind == "td" else 24))
    scope = ' scope="col"' if kind == "th" else ""
    of_class = f' class="{" ".join(names)}"' if names else ""
    return f"<{kind}{scope}{of_class}>{escape(text)}</{kind}>"
