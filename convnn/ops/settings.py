"""How neighbours are chosen and mixed, as values, and the one check of choices and ranges. Imports no torch.

A setting is one field here: its default, its choices or its range, and its description. The configuration's
``operator`` group inherits these fields, the layers take them as keyword arguments, and the operator gets them whole.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from convnn.errors import ConfigError


def choice(default: str, *others: str) -> Any:
    """Declare a field that takes one of some names; the first is the default."""
    return field(default=default, metadata={"choices": (default, *others)})


def number(
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    words: tuple[str, ...] = (),
) -> Any:
    """Declare a field for a number (or None) within [low, high]; ``above`` and ``below`` leave out the bounds.

    ``words`` may stand in place of a number.
    """
    return field(default=default, metadata={"range": (low, high, above, below), "words": words})


def later(spec: Any) -> Any:
    """Declare a field that came after runs had been made without it: at its default it is no part of a run's identity.

    So a run folder and its fingerprint outlive new settings. ``spec`` is a default or another declaration.
    """
    if not isinstance(spec, Field):
        return field(default=spec, metadata={"later": True})
    parts = {"default": spec.default} if spec.default is not MISSING else {"default_factory": spec.default_factory}
    return field(**parts, metadata={**spec.metadata, "later": True})


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which neighbours a query gets."""

    k: int = number(9, 1)
    """Neighbours per query."""
    k_policy: str = choice("error", "clamp")
    """When k exceeds the candidates: ``error``, or ``clamp`` to all of them (the first weight slots stay in use)."""
    similarity: str = choice("cosine", "euclidean", "dot")
    """Of features: ``cosine``, ``euclidean`` (negative squared distance) or ``dot`` (scaled by 1/sqrt(d))."""
    score_step: float | None = later(number(None, 0, above=True))
    """Scores are rounded to multiples of this before they are ranked, so that those that differ by rounding errors tie,
    on every device; null: ranked as computed."""
    mix: str = choice("sum", "concat")
    """How a blend mixes: ``sum`` of the scores, or ``concat``: features and coordinates side by side (the paper's)."""
    distance: str = choice("chebyshev", "euclidean")
    """Of positions: ``chebyshev`` or ``euclidean``, in pixels or tokens."""
    candidates: str = choice("all", "random", "grid", "window", "stride")
    """Tokens that may be chosen: ``all``, ``random`` (num_candidates of them), ``grid`` (num_candidates per side),
    ``window`` (at most num_candidates tokens away along each axis) or ``stride`` (a multiple of it away on each)."""
    num_candidates: int = number(32, 1)
    """Number of random candidates, side of the candidate grid, radius of the window, or the stride."""
    grid_rounding: str = later(choice("nearest", "floor", "sheared"))
    """Tokens at which the points of a candidate grid lie: the ``nearest``; ``floor``: those before (the authors'); or
    ``sheared``: those before, numbered as if there were no zero ring, so that they lie askew (the authors'
    convolutions)."""
    eval_candidates: str = choice("same", "all", "resample")
    """Random candidates at evaluation: ``same`` (one fixed seeded subset), ``all`` or ``resample`` (as the paper):
    drawn for every batch, by the run's seed, the step and the batch's first image."""
    candidate_seed: int = 0
    """Seed of the fixed subset."""
    pad_candidates: bool = True
    """Zero-padding tokens may be chosen at blend = 1 (below 1 they always may, as a convolution sees them)."""
    bias_selects: bool = later(False)
    """Attention only: a bias that the replaced layer adds to its scores (relative positions) bears on which neighbours
    are chosen too, not only on what they weigh."""
    self_first: bool = True
    """The query's own token is always its first neighbour."""
    self_again: float | None = later(number(None))
    """With self_first: score at which a query's own token stands among its candidates once more, as in the authors'
    sampled runs (-0.1); null: it does not."""
    causal: bool = later(False)
    """Attention only: a query sees the tokens in no row below and no column right of it, as in NATTEN's causal windows;
    with layout=sequence those up to itself. Prefix tokens see and are seen."""
    rank_step: int = later(number(1, 1))
    """Of the candidates, best first, every n-th is a neighbour, as in ViG's dilated graphs; 1: the k best."""
    slots: str = choice("rank", "raster", "window")
    """Weight slot of a neighbour: ``rank`` (best first), ``raster`` (by position, as kernel taps) or ``window``
    (a neighbour inside the kernel window meets its own tap, the others fill the free taps, best first)."""


GRAPHS = ("max_relative", "edge", "sage", "gin")
"""The aggregations of vision graphs."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What becomes of a query's neighbours."""

    weighting: str = choice("ones", "softmax", "score", "softmax_far")
    """``ones``, or the neighbours' feature similarity over the temperature: its ``softmax``, itself (``score``), or the
    softmax of its negative (``softmax_far``: the least alike weigh most, as in the authors' Euclidean learned runs)."""
    temperature: float = number(1.0, 0, above=True)
    """Divides the similarity."""
    self_score: float | None = later(number(None))
    """With self_first: similarity that a query's own token is weighed by, as in the authors' sampled runs (1); null:
    its own."""
    aggregation: str = choice("conv", "depthwise", "separable", "sum", *GRAPHS)
    """``conv`` (full or grouped weights per slot), ``depthwise`` (a weight per slot and channel), ``separable``
    (depthwise, then 1x1), ``sum``, or those of vision graphs, for convolutions: ``max_relative`` (largest difference to
    the query, then 1x1), ``edge`` (largest of a 1x1 of the query and the difference), ``sage`` (largest of a 1x1 of the
    neighbours, then a 1x1 with the query) and ``gin`` (sum with (1 + eps) times the query, eps learned, then 1x1)."""
    straight_through: bool = False
    """Let a gradient reach the selection: forward as ever, backward as if each neighbour were weighed by the softmax
    of its selection score. Always on where the blend is learned."""
    backend: str = choice("auto", "torch", "triton")
    """What computes: ``torch``: its own operations, along edges (``ops.edges``); ``triton``: its kernels on CUDA, or an
    error; ``auto``: on CUDA whichever is measured to be faster, in compiled graphs too, else ``torch``."""


T = TypeVar("T")


def part(kind: type[T], settings: Any) -> T:
    """Return the fields of one dataclass from an object that has them among others."""
    return kind(**{f.name: getattr(settings, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def choices_of(kind: type) -> dict[str, tuple[str, ...]]:
    """Return the named choices of a dataclass of settings, by field."""
    return {f.name: f.metadata["choices"] for f in fields(kind) if "choices" in f.metadata}


# -------------------------------------------------------------------------------------------------------- checks


def check_fields(settings: Any, prefix: str) -> None:
    """Check the choices and ranges that a dataclass declares.

    Args:
        settings: the values.
        prefix: stands before the field's name in the message, such as ``operator``; empty: nothing does.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    for f in fields(settings):
        value, key = getattr(settings, f.name), f"{prefix}.{f.name}" if prefix else f.name
        if "choices" in f.metadata:
            check_choice(key, value, f.metadata["choices"])
        elif "range" in f.metadata and value not in f.metadata["words"]:
            if isinstance(value, (str, bool)):
                raise ConfigError(f"{key}={value} must be a number{''.join(f' or {w}' for w in f.metadata['words'])}")
            check_range(key, value, *f.metadata["range"])


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ConfigError unless a value is one of the choices; the nearest one is suggested."""
    choices = list(choices)
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}{hint}")


def check_range(
    key: str,
    value: float | None,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raise ConfigError unless a number is finite and within [low, high]; ``above``/``below``: not on the bound."""
    if value is None:
        return
    inside = math.isfinite(value) and (value > low if above else value >= low)
    if not (inside and (value < high if below else value <= high)):
        raise ConfigError(f"{key}={value} must lie in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}")
