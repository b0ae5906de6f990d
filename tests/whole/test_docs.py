"""README.md and docs/: links, paths, commands, names and examples are true."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fake_runs import write_run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPS = ("convnn", "conf", "docs", "scripts", "tests", ".ci")


def ids(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists() and place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_files_exist(page):
    """Whatever begins with one of the repository's folders is a path or pattern in it; programs of commands exist."""
    text = page.read_text()
    named = re.findall(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, TOPS))})/(?:[\w./*-]|\[[\w-]+\])*", text)
    named += re.findall(r"uv run ((?:scripts/)?\w+\.py)", text)
    for name in named:
        name = name.rstrip(".")
        assert list(ROOT.glob(name)) if set("*[") & set(name) else (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_dotted_names_resolve(page):
    for name in sorted(set(re.findall(r"(?<![\w./-])convnn(?:\.\w+)+", page.read_text()))):
        found, rest = importlib.import_module("convnn"), name.split(".")[1:]
        for i, part in enumerate(rest):
            if not hasattr(found, part):
                importlib.import_module(".".join(["convnn", *rest[: i + 1]]))
            found = getattr(found, part)


def test_the_readme_is_short_and_begins_with_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    start = text.split("## Start")[1].split("##")[0]
    assert re.findall(r"^    (.+?)(?:  +#.*)?$", start, re.M) == [
        "pip install uv && uv run train.py experiment=quickstart",
        "pip install uv && uv run pytest",
    ]


def test_the_index_and_the_readme_name_every_page():
    for index in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([\w/.]+\.md)\)", index.read_text())}
        assert linked | {index} >= set(PAGES), index


def test_the_table_of_options_is_what_conf_holds():
    text = (ROOT / "docs" / "configuration.md").read_text()
    told = {}
    for groups, options in re.findall(r"^\| (`[a-z`, ]+`) \| (.+?) \| .+ \|$", text, re.M):
        parts = re.sub(r"\(.*?\)", "", options).split(";")
        names = re.findall(r"`(\w+)`", groups)
        for name, part in zip(names, parts if len(names) > 1 else [",".join(parts)], strict=True):
            told[name] = sorted(word.strip() for word in part.split(","))
    folders = [
        folder for folder in (ROOT / "conf").iterdir() if folder.is_dir() and folder.name not in ("grid", "table")
    ]
    assert told == {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def test_the_packages_are_those_of_the_checked_rule():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    text = (ROOT / "docs" / "extending.md").read_text().split("## The packages")[1]
    told = [name for cell in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.M) for name in re.findall(r"\w+", cell)]
    assert told == settings["contracts"][0]["layers"]
    tree = re.findall(r"^      (\w+)/ ", (ROOT / "README.md").read_text(), re.M)
    assert tree == [name for name in told if (ROOT / "convnn" / name).is_dir()]


def test_the_installed_programs_are_all_named():
    programs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for page, start in ((ROOT / "README.md", "Installed as"), (ROOT / "docs" / "extending.md", "Installed in another")):
        told = re.search(rf"^{start} .*?(?=\n\n)", page.read_text(), re.M | re.S)
        assert sorted(re.findall(r"`(convnn-[a-z-]+)`", told[0])) == sorted(programs), page


def commands(program, *pages):
    """Arguments of the complete commands of a program, with a folder for DIR; the reader's own code is left out."""
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        for command in re.findall(rf"^ *(?:.*&& )?uv run {re.escape(program)} (.+)$", text, re.M):
            words = shlex.split(command, comments=True)
            if "..." not in words and not any(word in command for word in ("shift", "mynet", "data=mine", "--")):
                yield [word.replace("=DIR", "=.") for word in words]


def test_training_commands_compose(tmp_path, monkeypatch):
    from convnn.cli.continuing import config_from_folder
    from convnn.config.compose import compose_config

    every = list(commands("train.py", *PAGES))
    assert len(every) >= 10
    monkeypatch.chdir(write_run(tmp_path / "r", {"train.epochs": 10}))
    for weights in ("FILE", "model.safetensors"):
        Path(weights).write_bytes(b"weights")
    Path("checkpoints").mkdir(exist_ok=True)
    Path("checkpoints/last.pt").write_bytes(b"weights")
    for words in every:
        assert config_from_folder(words) or compose_config(words)


@pytest.mark.long
def test_sweep_commands_have_points():
    from convnn.config.overrides import is_sweep
    from convnn.sweep.options import sweep_options
    from convnn.sweep.plan import make_plan

    every = list(commands("sweep.py", ROOT / "README.md"))
    assert len(every) == 4
    for words in every:
        plan = make_plan(sweep_options([w for w in words if is_sweep(w)]), [w for w in words if not is_sweep(w)])
        assert len(plan.points) >= 18 and not plan.invalid


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_examples_run(page, tmp_path):
    """The Python blocks of a page, one after the other, with images in place of the reader's own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    prelude = "import torch\nimages, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])\n"
    assert len(blocks) >= 2
    done = subprocess.run(
        [sys.executable, "-c", prelude + "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "neighbors.png").is_file()
