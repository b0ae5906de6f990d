"""A trained model's layers at other settings, with its own weights: nothing is trained, drawn or loaded again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from convnn.config.schema import BackboneConfig, Config
from convnn.errors import ConfigError
from convnn.models.backbones import create_backbone
from convnn.models.sites import is_operator
from convnn.models.swap import swap_layers
from convnn.models.tokens import set_configured_grid
from convnn.nn.base import NeighborLayer

_STATE = "_extra_state"
_BLEND = "blend_logit"
MOVABLE = ("blend", "k", "temperature")
_PLACES = ("grid_size", "token_grid", "num_prefix_tokens")
"""What tells an attention layer where its tokens lie."""


class Moving:
    """Builds replacements of a trained model's layers that share its weights.

    A model that was trained with a swap keeps its places; its layers are built anew with other settings, and take the
    tensors of the old. In a plain model the swap of each configuration takes place, with ``init=transfer``.

    Args:
        model: the trained one. It stays as it is, but inside ``placed``.
        backbone: of the network before its swap, without weights of a file; counts where there was a swap.
        size: classes, channels and image side of the network.
    """

    def __init__(self, model: nn.Module, backbone: BackboneConfig, size: tuple[int, int, int]) -> None:
        self.model = model
        names = [name for name, module in model.named_modules() if is_operator(module) and name]
        names = [n for n in names if not any(n.startswith(f"{outer}.") for outer in names)]
        self._plain: dict[str, nn.Module] = {}
        """Layers as they were before the swap, without the weights, by name."""
        if names:
            plain = create_backbone(backbone, *size)
            self._plain = {name: plain.get_submodule(name) for name in names}

    @property
    def swapped(self) -> list[str]:
        """Names of the layers that the model was trained with in the place of others; none: it is plain."""
        return list(self._plain)

    def layers(self, config: Config, moved: Collection[str], own_k: int | str) -> dict[str, nn.Module]:
        """Return the layers at the operator's settings in ``config``, by name, in forward order.

        Args:
            config: with the operator and, for a plain model, the swap.
            moved: settings of the operator that are to be those of ``config``; blend, k and temperature stay at those
                of the model's layers where they are not among them.
            own_k: that the model's layers were built with.

        Raises:
            ConfigError: where a setting would change the shape of a parameter, or a layer cannot have it.
        """
        for label, rule in config.swap.effective_rules().items():
            fixed = next((key for key in moved if key in (rule.operator or {})), None)
            if fixed is not None:
                raise ConfigError(f"operator.{fixed}: swap.rules.{label} sets its own, which would stay where it is")
        new = self._built(config)
        if not self.swapped:
            return new
        ranked: dict[str, nn.Module] = {}
        for name, layer in new.items():
            own, wanted = self.model.get_submodule(name), layer
            wrong = _misfit(layer, own)
            if wrong and "k" in moved and config.operator.k != own_k:
                ranked = ranked or self._built(replace(config, operator=replace(config.operator, k=own_k)))
                layer = ranked[name]
                wrong = _misfit(layer, own)
                if not wrong:
                    _check_ranked(layer, wanted, name)
            if wrong:
                raise ConfigError(f"'{name}': {wrong}; a trained model takes settings alone that change no parameter")
            layer.load_state_dict(_weights_for(layer, own), strict=False, assign=True)
            _stand(layer, own, wanted, moved, name)
            new[name] = layer
        return new

    def _built(self, config: Config) -> dict[str, nn.Module]:
        """Return what a swap puts in, by name; the model's layers are back in their places afterwards."""
        before = dict(self.model.named_modules(remove_duplicate=False))
        try:
            for name, layer in self._plain.items():
                self.model.set_submodule(name, layer)
            report = swap_layers(self.model, config.swap, config.operator, "fresh" if self.swapped else "transfer")
            set_configured_grid(self.model, config.backbone)
            return {row.name: self.model.get_submodule(row.name).eval() for row in report.rows}
        finally:
            for name in _changed_places(self.model, before):
                self.model.set_submodule(name, before[name])

    @contextmanager
    def placed(self, layers: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
        """Yield the model with these layers in their places; on exit it is as it was."""
        before = dict(self.model.named_modules(remove_duplicate=False))
        try:
            for name, layer in layers.items():
                for place in [place for place, module in before.items() if module is before[name]]:
                    self.model.set_submodule(place, layer)
            yield self.model
        finally:
            for name in _changed_places(self.model, before):
                self.model.set_submodule(name, before[name])


def _changed_places(model: nn.Module, before: Mapping[str, nn.Module]) -> list[str]:
    """Return the names at which other modules stand now, without those below such a name."""
    now = dict(model.named_modules(remove_duplicate=False))
    other = [name for name, module in now.items() if name in before and before[name] is not module]
    return [n for n in other if not any(n.startswith(f"{outer}.") for outer in other)]


def _weights_for(new: nn.Module, own: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer that another of other settings takes: all but where it stands on the spectrum.

    A learned blend is left behind where the new layer learns none.
    """
    wanted = new.state_dict()
    kept = {name: value for name, value in own.state_dict().items() if not name.endswith(_STATE)}
    return {name: value for name, value in kept.items() if name in wanted or not name.endswith(_BLEND)}


def _misfit(new: nn.Module, own: nn.Module) -> str:
    """Say which parameter of a layer has another shape in its replacement, or none; empty: all fit."""
    shapes = {name: tuple(value.shape) for name, value in _weights_for(new, own).items()}
    wanted = {name: tuple(value.shape) for name, value in new.state_dict().items() if not name.endswith(_STATE)}
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            here, there = (str(one.get(name, "none")) for one in (shapes, wanted))
            return f"{name} is {here} in the trained model and {there} with these settings"
    return ""


def _check_ranked(layer: nn.Module, wanted: nn.Module, name: str) -> None:
    """Raise ConfigError where a layer with a weight for each of its neighbours cannot have as many as ``wanted``."""
    for (_, one), (_, other) in zip(_spectral(layer), _spectral(wanted), strict=True):
        if one.settings.border != "nearest" and other.k != one.k_max:
            raise ConfigError(f"operator.k={other.k}: the window of '{name}' is that of k={one.k_max}, by its border")
        if other.k > one.k_max:
            raise ConfigError(
                f"operator.k={other.k}: '{name}' has a weight for each of {one.k_max} neighbours; more are for "
                "operator.aggregation=sum alone, if it was trained so"
            )


def _spectral(layer: nn.Module) -> list[tuple[str, NeighborLayer]]:
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, NeighborLayer)]


def _stand(layer: nn.Module, own: nn.Module, wanted: nn.Module, moved: Collection[str], name: str) -> None:
    """Let a layer stand on the spectrum where ``wanted`` does in what is moved, and where ``own`` does in the rest."""
    for (_, one), (_, before), (_, there) in zip(_spectral(layer), _spectral(own), _spectral(wanted), strict=True):
        values: dict[str, Any] = {key: getattr(there if key in moved else before, key) for key in MOVABLE}
        if one.blend_logit is not None:
            if "blend" in moved:
                way = "operator.learn_blend=no lets it be set"
                raise ConfigError(f"operator.blend: '{name}' has learned its blend; {way}")
            del values["blend"]
        try:
            one.set_spectrum(**values)
        except ValueError as error:
            raise ConfigError(f"'{name}': {error}") from error
        for attribute in _PLACES:
            if hasattr(before, attribute):
                setattr(one, attribute, getattr(before, attribute))
        if "backend" not in moved:
            one.backend = "auto"  # a run that demanded kernels may be evaluated without them
