"""What an analysis is, and the results that it draws. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convnn.errors import ConfigError
from convnn.stats.paired import mean_interval
from convnn.text import Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convnn.analysis.subject import Subject

Result = dict[str, Any]
"""What ``measure`` returned; see ``convnn.analysis`` for ``series`` and ``arrays``."""


class NotApplicable(ConfigError):  # noqa: N818 (it is a reason, not a failure)
    """An analysis says nothing about this run; the message says why, such as ``no layer chooses neighbours``."""


@dataclass(frozen=True)
class ArmResults:
    """Results of runs that differ in their seed alone."""

    name: str
    values: Mapping[str, Any]
    """Of the configuration keys that differ among the arms, such as ``{"operator.blend": 0.5}``."""
    results: Mapping[int, Result]
    """By seed; at least one."""


@dataclass(frozen=True)
class Analysis:
    """A way to look at a finished run."""

    title: str
    source: str
    """Paper and equation."""
    measure: Callable[[Subject], Result]
    """Of one run.

    Raises:
        NotApplicable: where it says nothing about the run.
    """
    headline: Callable[[Result], dict[str, float]]
    """The few numbers that stand for a result; the same names for every run, without those that are not known of it."""
    draw: Callable[[Sequence[ArmResults]], Figure]
    compare: Callable[[Sequence[ArmResults]], Sequence[ArmResults]] | None = None
    """Adds to the results what follows from several runs, such as likenesses; before they are drawn and tabled."""
    images: int | None = None
    """Test images that it takes by default, evenly over the classes; None: all."""
    version: int = 1
    """Of the numbers: kept results of another one are measured again."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its t interval of 95 %; the interval is NaN for fewer than two seeds."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Mean:
        """Return the mean of the values that are defined; NaN without one."""
        score = Score.of([value for value in values if value is not None])
        return cls(score.mean, *mean_interval(score.mean, score.std, score.n), score.n)


def series_means(arm: ArmResults, name: str) -> tuple[list[Any], list[Mean]]:
    """Return where a series of an arm has values, and its mean over seeds at each place; empty where it has none."""
    found = [result["series"][name] for result in arm.results.values() if name in result.get("series", {})]
    places = list(dict.fromkeys(at for one in found for at in one["at"]))
    by_place = [dict(zip(one["at"], one["values"], strict=True)) for one in found]
    return places, [Mean.of([one.get(at) for one in by_place]) for at in places]


def headline_means(arm: ArmResults, headline: Callable[[Result], dict[str, float]]) -> dict[str, Mean]:
    """Return the mean over seeds of each number that stands for the results of an arm."""
    rows = [headline(result) for result in arm.results.values()]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: Mean.of([row.get(name) for row in rows]) for name in names}
