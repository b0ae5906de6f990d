"""The reference of all keys, read from the schema: complete, true, and with a description of each."""

import importlib
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from site_references import PROGRAMS, keys_page, program_groups

from convnn import Config, OperatorConfig
from convnn.cli.program import option_lines, script_options
from convnn.config.keys import all_keys
from convnn.config.reference import field_docs, groups
from convnn.ops.settings import choice, number
from convnn.sweep.options import SweepConfig


@dataclass
class Base:
    """What is inherited."""

    first: int = number(1, 0, 9, below=True)
    """Of the base."""
    bare: bool = False
    again: str = "a"
    """Said before."""


@dataclass
class Inner:
    """An inner group."""

    last: list[float] = field(default_factory=lambda: [0.5, 1e-6])
    """In ``Markdown``."""


@dataclass
class Sample(Base):
    """A group."""

    again: str = choice("b", "c")
    """Said anew,
    on two lines."""
    inner: Inner = field(default_factory=Inner)
    from_: float | None = number(None, 0, above=True)
    """A word of Python's."""


def documented(schema):
    """Return every dotted key, and those without a description."""
    keys = [key for group in groups(schema) for key in group.keys]
    return {key.name for key in keys}, [key.name for key in keys if not key.about]


def test_what_is_read_of_a_schema():
    own, inner = groups(Sample, "sample")
    assert (own.name, own.about, inner.name, inner.about) == ("sample", "A group.", "sample.inner", "An inner group.")
    first, bare, again, word = own.keys
    assert (first.name, first.type, first.default, first.range) == ("sample.first", "int", "1", ">= 0 and < 9")
    assert (bare.about, bare.default) == ("", "false")
    assert (again.about, again.default, again.choices) == ("Said anew, on two lines.", "b", ("b", "c"))
    assert (word.name, word.default, word.range) == ("sample.from", "null", "> 0")
    assert (inner.keys[0].about, inner.keys[0].default) == ("In `Markdown`.", "[0.5, 1e-06]")


def test_a_key_without_a_description_is_found():
    assert documented(Sample)[1] == ["bare"]


@pytest.mark.parametrize("schema", [Config, SweepConfig])
def test_every_key_is_there_and_described(schema):
    names, bare = documented(schema)
    every = set(all_keys(schema))
    assert names == {key for key in every if not any(other.startswith(f"{key}.") for other in every)}
    assert len(names) > 10 and not bare
    empty = [group.name for group in groups(schema) if not group.about]
    assert not empty


def test_the_descriptions_are_those_of_the_class_that_has_the_field():
    assert field_docs(OperatorConfig)["num_candidates"].startswith("Number of random candidates")  # of Selection
    assert set(field_docs(OperatorConfig)) == {f.name for f in fields(OperatorConfig)}


def test_the_page_has_a_row_for_every_key():
    page = keys_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    told = {row.split("`")[1] for row in rows}
    assert told >= documented(Config)[0] | {f"sweep.{name}" for name in documented(SweepConfig)[0]}
    assert "| `operator.candidates`" in page and "`all`, `random`, `grid`, `window`, `stride`" in page
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)  # a bar in a cell is escaped
    ids = [row.split('id="')[1].split('"')[0] for row in rows]
    assert len(ids) == len(set(ids))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_option_of_the_programs_is_described():
    found = dict(program_groups())
    assert found.keys() == PROGRAMS.keys()
    assert [(program, key.name) for program, group in found.items() for key in group.keys if not key.about] == []
    own = ["run", "checkpoint", "data_root", "device", "corruption", "severity", "limit", "layers", "out", "data"]
    assert [key.name for key in found["scripts/evaluate.py"].keys] == own


def test_every_program_with_options_has_a_row():
    scripts = Path(__file__).parents[2] / "scripts"
    files = [*scripts.glob("*.py"), *(scripts.parent / "convnn" / "cli").glob("*.py")]
    asking = {f"scripts/{file.name}" for file in files if "_options(Options" in file.read_text()}
    assert asking == PROGRAMS.keys()


def test_help_has_the_options_as_the_schema_describes_them():
    lines = option_lines(Base).splitlines()
    assert lines == [
        "  first  Of the base (default 1)",
        "  bare    (default false)",
        "  again  Said before (default a)",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_program(program, capsys):
    module = importlib.import_module(PROGRAMS[program])
    usage = getattr(module, "USAGE", None) or module.__doc__
    with pytest.raises(SystemExit) as left:
        script_options(module.Options, ["--help"], usage)
    told = capsys.readouterr().out
    assert left.value.code == 0 and option_lines(module.Options) in told
    assert max(map(len, told.splitlines())) <= 120
