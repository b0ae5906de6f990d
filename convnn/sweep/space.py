"""What a search may choose: Hydra's sweep syntax as Optuna's distributions, and back. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from convnn.config.compose import hydra_context, several_trackers, translate
from convnn.config.load import to_config
from convnn.errors import ConfigError
from convnn.sweep.options import SweepRun

MOST_CHECKED = 100
"""Choices of a key that are looked at before the first trial."""

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Space:
    """The keys that a search chooses, and what all its runs have in common."""

    fixed: tuple[str, ...]
    """Overrides."""
    searched: dict[str, BaseDistribution]
    """By key, with the ``+`` that the command line gave it."""
    texts: dict[str, str]
    """What the command line says of each."""

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial."""
        return [*self.fixed, *(f"{key}={_text(params[key])}" for key in self.searched)]


def read_space(overrides: Sequence[str]) -> Space:
    """Return what overrides say.

    ``a,b`` and ``choice(a,b)`` are one of these, ``range(1,10)`` a number of it, ``interval(0,1)`` a real number
    between, ``int(interval(1,9))`` an integer; ``tag(log,...)`` around an interval makes it even in the logarithm.

    Raises:
        ConfigError: for an override that Hydra cannot read, or if nothing is left to choose.
    """
    try:
        with hydra_context():
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise translate(error, list(overrides), SweepRun) from error
    swept = [o for o in parsed if o.is_sweep_override()]
    for override in swept:
        if override.get_key_element() in ("tracker", "tracker.name"):
            raise several_trackers(str(override.input_line))
    if not swept:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to choose; give a key several values or an interval: "
            "'optim.lr=tag(log,interval(1e-4,1e-1))'"
        )
    fixed = tuple(str(o.input_line) for o in parsed if not o.is_sweep_override())
    keys = {override.get_key_element(): override for override in swept}
    texts = {key: str(override.input_line).partition("=")[2] for key, override in keys.items()}
    searched = {key: _distribution(override) for key, override in keys.items()}
    for override in swept:
        _check_ends(override)
    return Space(fixed, searched, texts)


def _check_ends(override: Override) -> None:
    """Raise ConfigError for a choice, or an end of an interval, that no run could have."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        ends = [str(value.start), str(value.end)]
    else:
        ends = [str(text) for text in override.sweep_string_iterator()]
    for end in ends[:MOST_CHECKED]:
        try:
            to_config(OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={end}"])))
        except ConfigError as error:
            if str(error).startswith(f"{key}="):  # of itself, whatever the other keys are
                raise ConfigError(f"{override.input_line}: {error}") from error
        except OmegaConfBaseException:
            return  # of a group, or of the user's own


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    kind: Any
    try:
        if (tags := set(getattr(value, "tags", ()))) and (tags != {"log"} or not isinstance(value, IntervalSweep)):
            raise ValueError("the only tag is log, around an interval")
        if isinstance(value, IntervalSweep):
            if value.start == value.end:
                raise ValueError(f"from {value.start} to {value.end} there is nothing to choose")
            kind = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
            return kind(value.start, value.end, "log" in value.tags)
        if override.is_range_sweep():
            numbers: list[Any] = list(override.sweep_iterator())
            kind = IntDistribution if all(isinstance(number, int) for number in numbers) else FloatDistribution
            step = abs(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
            return kind(min(numbers), max(numbers), step=step)
        return CategoricalDistribution([str(text) for text in override.sweep_string_iterator()])
    except (ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"{override.input_line} cannot be searched: {error}") from error


def _text(value: Any) -> str:
    """Return a choice as a value of an override; real numbers have the digits that six places hold."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
