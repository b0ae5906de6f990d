"""The page of a report in a real browser, with its mouse, its keyboard and its rules of what a page may load."""

import csv
import re
from pathlib import Path
from shutil import which

import pytest
from fake_arms import arms, shares
from fake_runs import grid, write_run

from convnn.report.build import make_report

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: uv sync")
CHROMIUM = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")]
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
EVIL = "<script>alert(1)</script>"
CONTRAST = """() => {
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (one) => {
    for (let e = one; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour.slice(0, 3);
    }
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || parent.closest("script, svg, [hidden]")) continue;
    const pair = [numbers(getComputedStyle(parent).color).slice(0, 3), behind(parent)].map(light).sort((a, b) => b - a);
    found[parent.tagName + "." + parent.className] = (pair[0] + 0.05) / (pair[1] + 0.05);
  }
  return found;
}"""


def write_runs(name, root):
    """Write the runs of a report by its name."""
    if name == "runs":
        right = {"plain": shares(0.70), "middle": shares(0.78, 0.012), EVIL: shares(0.65, 0.02)}
        arms(root, right | {"a_name_" * 12: shares(0.72, 0.02)})
        lost = root / "points" / "lost"
        write_run(lost, {"operator.blend": 0.1}, seed=9, status="diverged", reason="nan " * 90)
    elif name == "many":
        for i in range(200):
            keys = {"operator.blend": i % 20 / 20, "operator.k": i // 20 + 1, "optim.lr": (i * 7 % 5 + 1) / 1000}
            write_run(root / f"r{i}", keys, 50 + i * 7919 % 100 / 10, gflops=1 + i / 100, seconds=100.0 + i)
    elif name == "grid":
        grid(root, layers=2)
    else:
        write_run(root / "r", status="complete" if name == "one" else "diverged", reason="nan")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return what returns the folder of a report by its name, made when it is first asked for."""
    root = tmp_path_factory.mktemp("pages")

    def made(name):
        out = root / name / "report"
        if not out.exists():
            write_runs(name, root / name)
            make_report([root / name], out)
        return out

    return made


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(pages, browser):
    """Return what opens a report's page; at the end nothing may have been loaded or complained about."""
    contexts, seen = [], []

    def opened(name, viewport=WIDE, **settings):
        context = browser.new_context(viewport=viewport, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: seen.append(request.url) if not request.url.startswith("data:") else None)
        for event in ("console", "pageerror", "dialog"):
            page.on(event, lambda what: seen.append(str(getattr(what, "text", what))))
        url = (name if isinstance(name, Path) else pages(name) / "index.html").as_uri()
        page.goto(url)
        assert seen.pop() == url
        return page

    yield opened
    for context in contexts:
        context.close()
    assert seen == []


def column(page, title, section="differences"):
    """Return the cells below a heading of a section's first table, and the heading's button."""
    table = page.locator(f"#{section} table").first
    titles = [text.strip() for text in table.locator("th").all_inner_texts()]
    place = next(i for i, text in enumerate(titles) if text.startswith(title))
    cells = table.locator(f"tbody td:nth-child({place + 1})").all_inner_texts()
    return cells, table.locator("th").nth(place).locator("button")


def rows_of(folder):
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1280", "360"])
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_the_first_screen_answers(visit, viewport, scripts):
    page = visit("runs", viewport, java_script_enabled=scripts)
    facts = page.locator("#answer .facts > div")
    texts = facts.all_inner_texts()
    assert [text.split("\n")[0] for text in texts] == ["What won?", "By how much?", "Is it real?", "What did it cost?"]
    assert "middle" in texts[0] and "+8.00 points" in texts[1] and "beyond chance" in texts[2] and "1.10×" in texts[3]
    for one in (page.locator("#answer h2"), page.locator("#answer > p"), *facts.all()):
        box = one.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= viewport["height"]


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1280", "360"])
@pytest.mark.parametrize("name", ["runs", "many", "grid", "one", "failed"])
def test_no_page_is_wider_than_the_screen(visit, name, viewport):
    page = visit(name, viewport)
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    page.mouse.wheel(400, 0)
    assert page.evaluate("scrollX") == 0
    wide = page.locator(".scroll, .across").evaluate_all("all => all.map((e) => e.getBoundingClientRect().right)")
    assert all(right <= viewport["width"] for right in wide)


def test_the_mouse_sorts_by_number_and_back(visit):
    page = visit("many")
    before, button = column(page, "top1_last", "summary")
    assert len(before) == 200
    button.click()
    cells, _ = column(page, "top1_last", "summary")
    numbers = [float(cell.split()[0]) for cell in cells]
    assert numbers == sorted(numbers) and sorted(cells) == sorted(before) and cells != before
    assert page.locator("#summary th[aria-sort]").evaluate_all("all => all.map((e) => e.ariaSort)") == ["ascending"]
    button.click()
    cells, _ = column(page, "top1_last", "summary")
    numbers = [float(cell.split()[0]) for cell in cells]
    assert numbers == sorted(numbers, reverse=True)


def test_the_keyboard_sorts_and_equal_rows_keep_their_order(visit):
    page = visit("many")
    column(page, "operator.blend", "summary")[1].focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")  # now descending
    ks, button = column(page, "operator.k", "summary")
    blends, _ = column(page, "operator.blend", "summary")
    assert [float(b) for b in blends] == sorted(map(float, blends), reverse=True)
    button.focus()
    page.keyboard.press("Space")
    ks, _ = column(page, "operator.k", "summary")
    blends, _ = column(page, "operator.blend", "summary")
    pairs = [(int(k), -float(b)) for k, b in zip(ks, blends, strict=True)]
    assert pairs == sorted(pairs) and len(set(pairs)) == 200  # 10 after 9, and within each k the earlier order


def test_cells_of_every_kind_have_their_order(visit):
    page = visit("runs")
    cells = ["–", "< 0.0001", "10 (n=2)", "-1.5 ± 2", "+0.5 [0, 1]", "> 0.999", "2 KB", "1.5 MB", "b10", "b9", "1e-05"]
    page.evaluate(
        """(cells) => {
          const body = document.querySelector("#summary tbody");
          body.replaceChildren(...cells.map((text) => {
            const row = document.createElement("tr");
            row.append(Object.assign(document.createElement("td"), { textContent: text }));
            return row;
          }));
        }""",
        cells,
    )
    button = page.locator("#summary th button").first
    order = ["-1.5 ± 2", "1e-05", "< 0.0001", "+0.5 [0, 1]", "> 0.999", "10 (n=2)", "2 KB", "1.5 MB"]
    for numbers, texts in ((order, ["b9", "b10"]), (order[::-1], ["b10", "b9"])):
        button.click()
        assert page.locator("#summary tbody td").all_inner_texts() == [*numbers, *texts, "–"]


def test_a_point_says_what_the_summary_has(visit, pages):
    page = visit("grid")
    figure = page.locator("figure").filter(has_text="Accuracy over blend. ").first
    figure.scroll_into_view_if_needed()
    circles = figure.locator("circle")
    known = {(row["operator.k"], row["operator.blend"]): row for row in rows_of(pages("grid"))}
    assert circles.count() == len(known) == 9
    for i in range(9):
        box = circles.nth(i).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 4)
        lines = page.locator("#tip").inner_text().split("\n")
        assert page.locator("#tip").is_visible() and page.locator("circle.near").count() == 1
        for line in lines:
            k, blend, mean, std, n = re.fullmatch(r"k=(\d+), blend=(.+): (.+) ± (.+) \(n=(\d)\)", line).groups()
            row = known.pop((k, str(float(blend))), None)
            assert row is None or (mean, std, n) == (
                f"{float(row['top1_last_mean']):.2f}",
                f"{float(row['top1_last_std']):.2f}",
                row["top1_last_n"],
            )
    assert not known
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden() and page.locator("circle.near").count() == 0


def test_arrows_go_from_point_to_point_and_tab_past_them(visit):
    page = visit("grid")
    figure = page.locator("figure").filter(has_text="Accuracy over blend. ").first
    circles = figure.locator("circle")
    assert figure.locator("circle[tabindex='0']").count() == 1
    circles.first.focus()
    for i, key in enumerate(("ArrowRight", "ArrowDown", "ArrowLeft", "Home", "End"), 1):
        page.keyboard.press(key)
        place = {1: 1, 2: 2, 3: 1, 4: 0, 5: 8}[i]
        label = circles.nth(place).get_attribute("aria-label")
        assert page.evaluate("document.activeElement.ariaLabel") == label
        page.wait_for_function("document.querySelector('#tip').hidden === false")
        assert label in page.locator("#tip").inner_text().split("\n")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.evaluate("document.dispatchEvent(new Event('scroll'))")  # as one that is late, or the user's own
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Tab")
    assert figure.locator("circle:focus").count() == 0 and page.locator("#tip").is_hidden()
    page.evaluate("document.querySelector('.plot svg').dispatchEvent(new Event('focusin'))")  # at the picture itself
    assert page.locator("#tip").is_hidden() and page.locator(".near").count() == 0


def test_a_finger_finds_a_point_and_leaves_it(visit):
    page = visit("grid", NARROW, has_touch=True)
    figure = page.locator("figure").filter(has_text="Accuracy over blend. ").first
    figure.scroll_into_view_if_needed()
    box = figure.locator("circle").first.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#tip").bounding_box()
    assert "k=4, blend=0: 84.50 ± 0.71 (n=2)" in page.locator("#tip").inner_text()
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 360
    page.touchscreen.tap(3, 3)  # beside all pictures
    assert page.locator("#tip").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_and_the_choice_of_colours_is_kept(visit, scheme):
    page = visit("runs", color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    for expected in (scheme, other):
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == expected
        found = page.evaluate(CONTRAST)
        assert len(found) > 10 and {where: ratio for where, ratio in found.items() if ratio < 4.5} == {}
        filters = page.locator("img").evaluate_all("all => all.map((e) => getComputedStyle(e).filter !== 'none')")
        assert set(filters) == {expected == "dark"}
        page.locator("#theme").focus()
        if expected == scheme:
            page.keyboard.press("Enter")
    kept = page.context.new_page()
    kept.goto(page.url)
    assert kept.evaluate("getComputedStyle(document.documentElement).colorScheme") == other


def test_without_scripts_all_is_there_and_no_button_does_nothing(visit, pages):
    page = visit("runs", NARROW, java_script_enabled=False)
    assert page.locator("button").count() == 0
    assert page.locator("#summary tbody tr").count() == len(rows_of(pages("runs")))
    titles = page.locator("circle title").all_text_contents()
    assert any(text.startswith("middle: 78.00 ± ") for text in titles)
    assert page.get_by_text(EVIL).count() > 1


def test_links_lead_below_and_the_page_needs_no_folder(visit, pages, tmp_path):
    page = visit("runs", NARROW)
    page.get_by_role("link", name="Failed").click()
    assert page.url.endswith("#failed") and -1 <= page.locator("#failed h2").bounding_box()["y"] < 740
    alone = tmp_path / "moved.html"
    alone.write_bytes((pages("runs") / "index.html").read_bytes())
    sizes = visit(alone).locator("img").evaluate_all("all => all.map((e) => e.naturalWidth)")
    assert sizes and min(sizes) > 300


def test_a_script_that_is_not_the_pages_does_not_run(pages, browser, tmp_path):
    page_file = Path(tmp_path / "changed.html")
    text = (pages("one") / "index.html").read_text()
    page_file.write_text(text.replace("</main>", "<script>document.title = 'changed'</script></main>"))
    page = browser.new_page()
    page.goto(page_file.as_uri())
    assert page.title() != "changed" and page.locator("#theme").count() == 1
    page.close()
