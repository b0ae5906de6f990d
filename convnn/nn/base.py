"""What the layers have in common: where they stand in a model, their settings, and moving along the spectrum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from convnn.config.checks import check_operator
from convnn.config.keys import nearest
from convnn.config.schema import OperatorConfig
from convnn.errors import ConfigError
from convnn.ops.geometry import Pair
from convnn.ops.neighborhood import Neighborhood, same_draws
from convnn.ops.precision import has_float64
from convnn.ops.settings import Mixing, Selection, check_choice, choices_of, part


class TokenGrid:
    """The grid of patches that a model makes of its present image, noted by its patch embedding at each call.

    A number of tokens does not tell their layout: 36 patches are 6 x 6 or 4 x 9. One instance serves all layers behind
    a patch embedding; a deep copy of the model has its own.
    """

    def __init__(self) -> None:
        self.size: Pair | None = None
        """Rows and columns; None before the first call, and if the patch embedding does not tell."""
        self.called = False
        """Whether there was a call."""

    def note(self, patch_embed: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note the grid of an image (B, C, h, w); a forward hook of a patch embedding."""
        self.size, self.called = _patches_of(patch_embed, inputs[0], output), True


def _patches_of(patch_embed: nn.Module, image: Any, output: Any) -> Pair | None:
    """Return rows and columns of what a patch embedding has made of an image; None if they are not certain.

    It tells them itself: beside the tokens, by a map of one channel first (a convolution), by timm's
    ``dynamic_feat_size``, or by its ``grid_size`` if there are as many tokens (B, N, C).
    """
    told: Any = None
    tokens = output
    if isinstance(output, tuple):  # (tokens, (rows, columns))
        tokens, told = output[0], output[1] if len(output) > 1 else None
        told = told if isinstance(told, (tuple, list, torch.Size)) and len(told) == 2 else None
    if told is None and isinstance(patch_embed, nn.Conv2d):
        told = tokens.shape[-2:]
    if told is None and hasattr(patch_embed, "dynamic_feat_size"):
        told = patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))  # type: ignore[operator]
    if told is None:
        told = getattr(patch_embed, "grid_size", None)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            return None
    if told is None:
        return None
    rows, columns = int(told[0]), int(told[1])
    known = not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] == rows * columns
    return (rows, columns) if known else None


def grid_of(num_tokens: int, num_prefix_tokens: int, grid_size: Pair | None, seen: TokenGrid | None = None) -> Pair:
    """Return rows and columns of the grid in a sequence.

    Args:
        num_tokens: N, with the prefix.
        num_prefix_tokens: tokens before the grid.
        grid_size: as the layer was built with; None: a square, for a layer that no swap has put into a model.
        seen: what the model's patch embedding noted of the present image, which counts more.

    Raises:
        ValueError: if the tokens are not of that grid, or it is not known.
    """
    grid, known = num_tokens - num_prefix_tokens, seen.size if seen is not None else None
    if known is not None:
        if known[0] * known[1] != grid:
            raise ValueError(
                f"{num_tokens} tokens less {num_prefix_tokens} prefix tokens are not the {known[0]}x{known[1]} grid of "
                "the image's patches, so their positions are not known; set patch_drop_rate=0, say how many prefix "
                f"tokens there are ({_SAY}), or {_WITHOUT}"
            )
        return known
    if seen is not None and (seen.called or grid_size is None):
        raise ValueError(
            f"where {num_tokens} tokens lie is not known, as the network has no patch embedding that tells it; say it "
            f"({_SAY}, or backbone.token_grid=[ROWS,COLUMNS]), or {_WITHOUT}"
        )
    if grid_size is None:
        side = math.isqrt(max(grid, 0))
        grid_size = side, side
    if grid_size[0] * grid_size[1] != grid or grid < 1:
        raise ValueError(
            f"{num_tokens} tokens less {num_prefix_tokens} prefix tokens are neither grid_size={grid_size} nor a "
            "square; pass grid_size and num_prefix_tokens"
        )
    return grid_size


_SAY = "convnn.set_token_grid(model, (rows, columns), num_prefix_tokens)"
_WITHOUT = "use settings without positions (blend=1 with candidates=all or random)"


@dataclass(frozen=True)
class Site:
    """What a layer's surroundings tell about it: its name, and for attention the tokens' layout."""

    name: str = ""
    num_prefix_tokens: int = 0
    grid_size: Pair | None = None
    """As the model is configured now; an image may have another."""
    token_grid: TokenGrid | None = None
    """That of the present image; None: the layer stands alone, and its grid is ``grid_size`` or a square."""


def pair(value: int | tuple[int, ...]) -> Pair:
    """Return (rows, columns) of a number or pair."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


_EDGE = 0.001
_NOT_FOR_LAYERS = ("name", "kind", "target", "k", "blend", "bias", "options")


def layer_settings(config: OperatorConfig) -> dict[str, Any]:
    """Return the operator's settings that all layers take as keyword arguments."""
    names = (f.name for f in fields(OperatorConfig))
    return {n: getattr(config, n) for n in names if n not in _NOT_FOR_LAYERS and not n.startswith("branch_")}


def first_tensor(args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer that is called with these arguments, of which each may be given by its name."""
    return next(value for value in (*args, *given.values()) if isinstance(value, Tensor))


class NeighborLayer(nn.Module):
    """A layer on the spectrum. Blend, k and temperature may change at any time; no parameter or buffer does."""

    settings: OperatorConfig
    """As the layer was built."""
    selection: Selection
    """As it selects now: k may be lower than it was built with."""
    mixing: Mixing
    """As it mixes now: the temperature may be another."""
    blend_logit: nn.Parameter | None
    """Of a learned blend, (1,) or (H,): see ``blend_value``."""
    _by_features: bool | None
    """Which end of the spectrum the blend stands at, or None between them; a graph depends on this alone."""
    _blend_now: Tensor | None = None
    """The blend, () float64, once it has been set: see ``blend_value``."""
    _temperature_now: Tensor | None = None
    """The temperature likewise: see ``mixing_value``."""

    def _init_spectrum(self, kind: str, heads: int, settings: dict[str, Any]) -> None:
        """Check the settings, and start where they say.

        Raises:
            ConfigError: if they leave their range or contradict each other.
            TypeError: for a name that is no setting.
        """
        known = {"k", "blend", *layer_settings(OperatorConfig())}
        unknown = next((name for name in settings if name not in known), None)
        if unknown is not None:
            raise TypeError(f"{type(self).__name__} has no setting '{unknown}'{nearest(unknown, known)}")
        self.settings = config = OperatorConfig(kind=kind, **settings)
        check_operator(config, type(self).__name__)
        self.selection = part(Selection, config)
        learned = config.learn_blend != "no"
        self.mixing = replace(part(Mixing, config), straight_through=config.straight_through or learned)
        self._blend, self.blend_logit = float(config.blend), None
        self._by_features = _end(self._blend)
        if learned:
            start = ((torch.tensor(config.blend).clamp(0.01, 0.99) - _EDGE) / (1 - 2 * _EDGE)).logit()
            self.blend_logit = nn.Parameter(start.repeat(heads if config.learn_blend == "head" else 1))

    @property
    def k(self) -> int:
        """Neighbours in use, at most ``k_max``."""
        return self.selection.k

    @property
    def k_max(self) -> int:
        """Neighbours that the layer has weights for."""
        return int(self.settings.k)

    @property
    def temperature(self) -> float:
        """What divides the similarity."""
        return self.mixing.temperature

    @property
    def backend(self) -> str:
        """What computes; may be set."""
        return self.mixing.backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_choice("backend", name, choices_of(Mixing)["backend"])
        self.mixing = replace(self.mixing, backend=name)

    @property
    def blend(self) -> float:
        """0 selects by position, 1 by features; of a learned blend the mean over heads."""
        value = self.blend_value()
        return value if isinstance(value, float) else value.detach().mean().item()

    @property
    def end(self) -> bool | None:
        """Which end of the spectrum the layer stands at: True by features, False by position, None between them."""
        return None if self.blend_logit is not None else self._by_features

    def blend_value(self) -> float | Tensor:
        """Return the blend as the operator takes it: a number, or the learned (1,) or (H,) between 0.001 and 0.999.

        A learned blend stays off the ends, where the selection has one term only and the gradient would vanish. In a
        compiled graph one that has been set, and lies between the ends, is a tensor (): a number would be part of the
        graph, so that each new one would take a new compilation.
        """
        if self.blend_logit is not None:
            return _EDGE + (1 - 2 * _EDGE) * self.blend_logit.sigmoid()
        if not _in_graph():
            return self._blend
        if self._by_features is not None:
            return float(self._by_features)
        return self._blend if self._blend_now is None else self._blend_now

    def mixing_value(self) -> Mixing:
        """Return ``mixing`` as the operator takes it: the temperature is a tensor where ``blend_value`` says so."""
        if self._temperature_now is None or not _in_graph():
            return self.mixing
        return replace(self.mixing, temperature=self._temperature_now)  # type: ignore[arg-type]

    def set_spectrum(
        self, *, blend: float | None = None, k: int | None = None, temperature: float | None = None
    ) -> None:
        """Move the layer along the spectrum; what is not given stays.

        Raises:
            ValueError: when a value is out of range, or the blend is learned; nothing has changed then.
        """
        if blend is not None:
            if self.blend_logit is not None:
                raise ValueError("this layer learns its blend (learn_blend); it cannot be set")
            if not 0 <= blend <= 1:
                raise ValueError(f"blend={blend} must lie in [0, 1]")
        if k is not None:
            if not 1 <= k <= self.k_max:
                raise ValueError(f"k={k} must lie in [1, {self.k_max}]: the layer was built with k={self.k_max}")
            if k != self.k_max and self.selection.slots == "raster":
                raise ValueError(f"k={k}: a layer with slots=raster keeps its k={self.k_max}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be positive and finite")
        if blend is not None:
            self._blend, self._by_features = float(blend), _end(float(blend))
            self._blend_now = self._held(self._blend_now, self._blend)
        if k is not None and k != self.k:
            self.selection = replace(self.selection, k=int(k))
        if temperature is not None:
            self.mixing = replace(self.mixing, temperature=float(temperature))
            self._temperature_now = self._held(self._temperature_now, self.temperature)

    def _held(self, held: Tensor | None, value: float) -> Tensor:
        """Return a tensor with the value on the layer's device, the same one where possible."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        if held is not None and held.device == device:
            return held.fill_(value)
        return torch.tensor(value, dtype=torch.float64 if has_float64(device) else torch.float32, device=device)

    def spectrum(self) -> dict[str, float]:
        """Return where the layer is: blend, k and temperature."""
        return {"blend": self.blend, "k": self.k, "temperature": self.temperature}

    def movable(self) -> dict[str, float]:
        """Return what ``set_spectrum`` takes: the spectrum less a learned blend, which is in the state_dict."""
        values = self.spectrum()
        if self.blend_logit is not None:
            del values["blend"]
        return values

    def get_extra_state(self) -> Tensor:
        """Return blend, k and temperature, so that they travel with the ``state_dict``.

        They are float64 numbers seen as int64, (3,): averages of weights leave integers alone. A learned blend, which
        is a parameter, is NaN here.
        """
        blend = self._blend if self.blend_logit is None else math.nan
        return torch.tensor([blend, self.k, self.temperature], dtype=torch.float64).view(torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Stand where the layer stood that ``state`` comes from."""
        blend, k, temperature = state.cpu().view(torch.float64).tolist()
        moves = self.blend_logit is None and not math.isnan(blend) and blend != self._blend
        heats = temperature != self.temperature
        self.set_spectrum(blend=blend if moves else None, k=int(k), temperature=temperature if heats else None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # States of before this was kept, and those of plain layers, leave the spectrum as it is.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def neighborhood(self, x: Tensor, *, blend: float | None = None) -> Neighborhood:
        """Return what the layer chooses on an input, at its own blend or another.

        With random candidates it draws what ``forward`` would draw in its place.

        Raises:
            ValueError: if the layer has no answer.
        """
        raise ValueError(f"{type(self).__name__} does not say which neighbours it chooses")

    def with_neighbors(self, x: Tensor) -> tuple[Tensor, Neighborhood]:
        """Return the output and the neighbours that it comes from."""
        with same_draws(x.device):
            found = self.neighborhood(x)
        return self.forward(x), found

    def to_layer(self) -> nn.Module:
        """Return the plain layer that this one equals.

        Raises:
            ValueError: saying why there is none.
        """
        raise ValueError(f"{type(self).__name__} has no plain equivalent")

    def _spectrum_repr(self) -> str:
        parts = [f"k={self.k}" if self.k == self.k_max else f"k={self.k} of {self.k_max}", f"blend={self.blend:.3g}"]
        default = layer_settings(OperatorConfig())
        now = layer_settings(self.settings) | {"temperature": self.temperature}
        parts += [f"{name}={value}" for name, value in now.items() if value != default[name]]
        return ", ".join(parts)


def _end(blend: float) -> bool | None:
    return bool(blend) if blend in (0, 1) else None


def _in_graph() -> bool:
    """Return whether a graph is being compiled that this process will run with other values of the spectrum."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def options(config: OperatorConfig, **defaults: Any) -> dict[str, Any]:
    """Return ``operator.options`` over the defaults, whose types they must have.

    Raises:
        ConfigError: for an option that the operator lacks, or that is no positive number.
    """
    unknown = sorted(set(config.options) - set(defaults))
    if unknown:
        raise ConfigError(f"operator.options.{unknown[0]}: {config.name} has the options {', '.join(defaults)}")
    values = defaults | config.options
    for name, value in values.items():
        kind = type(defaults[name])
        number = isinstance(value, (kind, int)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            need = "integer" if kind is int else "number"
            raise ConfigError(f"operator.options.{name}={value} must be a positive {need}")
    return values


def refuse_transfer(init: str, site: Site, config: OperatorConfig) -> None:
    """Raise ConfigError for ``swap.init=transfer``, which a peer does not define."""
    if init == "transfer":
        raise ConfigError(f"swap.init=transfer: '{site.name}' has no counterpart in operator={config.name}; use fresh")
