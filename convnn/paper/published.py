"""The paper's tables: the experiments behind each row and the figures that were published for it. Imports no torch.

``conf/table/NAME.yaml`` has what the rows of a table share, ``conf/table/NAME.csv`` the rows. The CSV files are made
from the authors' result files by ``scripts/collect_published.py``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from convnn.config.folders import CONF_DIR
from convnn.config.keys import nearest, typed
from convnn.config.overrides import merge_overrides
from convnn.errors import ConfigError

TABLE_DIR = CONF_DIR / "table"


@dataclass(frozen=True)
class PaperRow:
    """One published run. Figures are None where nothing was published; accuracies are in percent."""

    row: str
    """Name of the row, unique in its table."""
    overrides: tuple[str, ...]
    """Overrides of ``train.py`` on top of the table's base."""
    params: int | None
    """Number of parameters."""
    gflops: float | None
    """Operations of a forward pass as the authors' profiler counted them: see ``convnn.paper.counts``."""
    top1_best: float | None
    """Top-1 of the best epoch, which was chosen on the test set."""
    top1_last: float | None
    """Top-1 of the last epoch."""
    top1_last5_mean: float | None
    """Mean top-1 of the last five epochs."""
    top5_best: float | None
    """Best top-5 of any epoch, chosen on the test set apart from top-1."""
    epochs: int
    seed: int
    source: str
    """Repository and path of the result file."""
    function: str = ""
    """``equal`` where our network computes the published function, ``differs: WHY``, or empty: not checked."""
    note: str = ""
    """What is odd about the row, or where our configuration differs from the authors' code."""


@dataclass
class _TableFile:
    """The keys of ``conf/table/NAME.yaml``."""

    name: str = ""
    title: str = ""
    base: list[str] = field(default_factory=list)
    careful: list[str] = field(default_factory=list)
    needs: str | None = None
    noise: dict[str, float] = field(default_factory=dict)
    noise_source: str = ""
    published: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table: the recipe that its rows share, and the rows."""

    name: str
    title: str
    base: tuple[str, ...]
    """Overrides of every row."""
    careful: tuple[str, ...]
    """Overrides that turn the published recipe into a careful one: augmentation and a validation split."""
    needs: str | None
    """What the rows need beyond a GPU and CIFAR."""
    noise: Mapping[str, float]
    """Standard deviation of top-1 between equal runs, in points, by ``data.name``, where it is known."""
    noise_source: str
    """Where ``noise`` comes from."""
    published: Path
    """The CSV file of the rows."""
    rows: tuple[PaperRow, ...]

    def overrides(self, row: PaperRow, *, careful: bool = False, extra: Sequence[str] = ()) -> list[str]:
        """Return all overrides of a row for ``train.py``; of several for one key the last counts, ``extra`` most."""
        return merge_overrides(self.base, row.overrides, self.careful if careful else (), extra)

    def row(self, name: str) -> PaperRow:
        """Return a row by its name.

        Raises:
            ConfigError: naming the nearest row, if there is none.
        """
        known = {row.row: row for row in self.rows}
        if name not in known:
            raise ConfigError(f"table {self.name} has no row '{name}'{nearest(name, known)}")
        return known[name]


def table_names() -> list[str]:
    """Return the names of all tables."""
    return sorted(path.stem for path in TABLE_DIR.glob("*.yaml"))


def load_table(name: str) -> PaperTable:
    """Read a table.

    Raises:
        ConfigError: for an unknown name, with the nearest one, or a damaged file.
    """
    path = TABLE_DIR / f"{name}.yaml"
    if name not in table_names():
        raise ConfigError(f"table={name}: no such table{nearest(name, table_names())}")
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    file = typed(_TableFile, values, f"{path.name}: ")
    published = TABLE_DIR / file.published
    return PaperTable(
        name=file.name,
        title=file.title,
        base=tuple(file.base),
        careful=tuple(file.careful),
        needs=file.needs,
        noise=file.noise,
        noise_source=file.noise_source,
        published=published,
        rows=tuple(read_rows(published)),
    )


def read_rows(path: Path) -> list[PaperRow]:
    """Read the rows of a table's CSV file.

    Raises:
        ConfigError: if it is missing, or its columns are not those of ``PaperRow``.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    columns = [f.name for f in fields(PaperRow)]
    if not lines or list(lines[0]) != columns:
        raise ConfigError(f"{path} does not have the columns {', '.join(columns)}")
    return [_row(line) for line in lines]


def _row(line: Mapping[str, str]) -> PaperRow:
    figures = ("gflops", "top1_best", "top1_last", "top1_last5_mean", "top5_best")
    values: dict[str, Any] = {name: float(line[name]) if line[name] else None for name in figures}
    values |= {name: int(line[name]) for name in ("epochs", "seed")}
    values |= {name: line[name] for name in ("row", "source", "function", "note")}
    params = int(line["params"]) if line["params"] else None
    return PaperRow(overrides=tuple(line["overrides"].split()), params=params, **values)
