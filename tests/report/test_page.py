"""The page of a report: one file that runs its own script alone, whatever runs are called, and has places for more."""

import base64
import hashlib
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from fake_runs import grid, write_run, write_sweep

from convnn.figures.hints import Hint
from convnn.report.build import make_report
from convnn.report.content import Picture, Section
from convnn.report.pages import html_page, markdown

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "name", "content", "scope", "class", "id", "role", "aria-label", "tabindex"),
    *("alt", "src", "href", "viewbox", "cx", "cy", "r"),
}
"""Of a page's elements: none of them runs anything."""


class Elements(HTMLParser):
    """The tags of a page, and the texts of its scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.texts, self.inside = [], [], {"script": [], "style": []}, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        for key, value in attrs:
            assert key in ATTRIBUTES and tag not in self.texts, (tag, key)
            assert key != "src" or value.startswith("data:image/svg+xml;base64,")
            assert key != "href" or (tag == "a" and value.startswith("#"))
            assert key != "alt" or len(value) > 20
            self.ids += [value] * (key == "id")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in self.texts:
            self.texts[self.inside].append(data)


def digest(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_page_escapes_what_runs_are_called_and_needs_nothing_else(tmp_path):
    evil = "<script>alert(1)<"
    for seed, k in ((0, 4), (1, 4), (0, 9)):
        keys = {"operator.name": f"{evil}$\\frac_{k}$|", "operator.blend": k / 10, "operator.k": k}
        write_run(tmp_path / f"{evil}{seed}{k}", keys, seed=seed, gflops=float(k))
    write_run(tmp_path / "failed<img src=x>", seed=7, status="diverged", reason="</table><script src=//evil>|x")
    write_run(tmp_path / "\udcff", {"backbone.kwargs": {evil: evil}}, seed=9, status=evil, reason="\ud800")
    write_sweep(tmp_path, [(evil, ["seed=8"], {"status": "failed"})], [{"overrides": [evil], "reason": evil}])
    make_report([tmp_path], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    elements = Elements(page)
    script, style = ((files("convnn.report") / name).read_text() for name in ("page.js", "page.css"))
    assert elements.texts == {"script": [script], "style": [style]}
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; "
    policy += f"script-src 'sha256-{digest(script)}'"
    assert f"content=\"{policy}; base-uri 'none'; form-action 'none'\"" in page
    assert "link" not in elements.tags and elements.tags.count("img") == elements.tags.count("figure") > 0
    assert "circle" in elements.tags and "&lt;script&gt;alert(1)&lt;$" in page
    assert '<html lang="en">' in page and '<meta charset="utf-8">' in page and "url(" not in page
    table = (tmp_path / "out" / "table.md").read_text()
    assert "<script" not in table
    widths = {
        line.replace("\\|", "").count("|") for line in table.split("## Failed")[0].splitlines() if line[:1] == "|"
    }
    assert len(widths) == 1


def test_the_answer_comes_first_and_links_lead_to_sections(tmp_path):
    report = make_report([grid(tmp_path, ks=(9,), blends=(0.0, 1.0))], tmp_path / "out", baseline="blend=0")
    page, table = (tmp_path / "out" / "index.html").read_text(), (tmp_path / "out" / "table.md").read_text()
    questions = ("What won?", "By how much?", "Is it real?", "What did it cost?")
    places = [page.index(words) for words in (*questions, "<nav>", "<h2>Differences", "<h2>Summary", "<img")]
    assert places[:5] == sorted(places[:5]) and max(places[:4]) < min(places[4:])
    headline = "Too few seeds to say" if report.differences.comparisons[0].paired.mean > 0 else "No arm beats blend=0"
    assert headline in page and table.splitlines()[2].startswith(f"**{headline}")
    elements = Elements(page)
    links = [part.split('"')[0] for part in page.split('<a href="#')[1:]]
    assert links == [one for one in elements.ids if one != "answer"] and len(links) > 3


def test_further_sections_have_a_place(tmp_path):
    report = make_report([write_run(tmp_path / "r")], tmp_path / "out")
    svg = tmp_path / "photo.svg"
    svg.write_text('<svg viewBox="0 0 200 100" xmlns="http://www.w3.org/2000/svg"><image/></svg>')
    picture = Picture("photo", "A photograph", "Of a <thing>.", svg, svg, [Hint(0.5, 0.25, "<b> 3")])
    report.sections.append(Section("Shape <b>", "What it <sees>.", [picture], [(["a", "b"], [["1", "x"], ["2", "y"]])]))
    page = html_page(report)
    part = page[page.index('<section id="shape-b">') :]
    assert '<circle cx="100.0" cy="25.0" r="7"><title>&lt;b&gt; 3</title></circle>' in part
    assert '<th scope="col" class="number">a</th><th scope="col">b</th>' in part and "What it &lt;sees&gt;." in part
    assert 'class="drawn"' not in part  # photographs are not inverted in the dark
    assert part.index("</section>") < part.index("Versions and hardware")
    assert "## Shape &lt;b&gt;\n\nWhat it &lt;sees&gt;.\n\n| a | b |" in markdown(report)
    assert "photo.svg" in report.text()
    Elements(page)
