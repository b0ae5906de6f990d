"""Weights of a run as the beginning of another one's network, those of its replaced layers among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convnn.config.identity import identity
from convnn.config.schema import BackboneConfig, Config
from convnn.errors import ConfigError
from convnn.models.swap import neighbor_layers
from convnn.models.weights import head_prefixes, put_weights, read_weights

_MEANING = ("target", "aggregation", "slots", "weighting")
"""Settings of an operator that say what its weights stand for; other ones choose neighbours, and may change."""


@dataclass(frozen=True)
class RunWeights:
    """A checkpoint of a run, as far as another run begins from it."""

    path: Path
    identity: Mapping[str, Any]
    """Of the run that wrote it."""
    layers: frozenset[str]
    """Names of its layers that choose neighbours."""
    classes: tuple[str, ...]
    """In the order of its outputs; empty if the checkpoint does not tell."""
    channels: int = 3
    """Of its images; of the first versions' checkpoints, which do not tell, 3 is assumed."""

    @property
    def swapped(self) -> bool:
        """Whether layers were replaced in that run."""
        swap = self.identity["swap"]
        return bool(swap["rules"]) or swap["match"] is not None

    def put(self, model: nn.Module, config: BackboneConfig, in_chans: int, classes: Sequence[str]) -> None:
        """Load the weights, averaged ones if there are such, as ``put_weights`` does.

        The classifier begins anew also where there are as many classes as in that run, but other ones.
        """
        state = read_weights(self.path, config.checkpoint_sha256)
        if self.classes and classes and self.classes != tuple(classes):
            state = {name: tensor for name, tensor in state.items() if not name.startswith(head_prefixes(model))}
        put_weights(model, state, config, in_chans, self.channels)
        model.pretrained_cfg["of_run"] = True  # type: ignore[index, operator]

    def check(self, model: nn.Module, config: Config) -> None:
        """Raise ConfigError unless a model's replaced layers are those that the weights were trained in."""
        said = f"backbone.checkpoint={self.path} is of a run with replaced layers"
        way = f"take its swap and operator: train.py from_run={self.path.parent.parent} backbone.checkpoint={self.path}"
        own = set(neighbor_layers(model))
        if not config.swap.effective_rules():
            raise ConfigError(f"{said}, and here none is replaced; {way}")
        other = sorted(own ^ self.layers)
        if other:
            raise ConfigError(f"{said}: {other[0]} is replaced {'here' if other[0] in own else 'there'} alone; {way}")
        here, there = identity(config)["operator"], self.identity["operator"]
        for key in _MEANING:
            if here.get(key) != there.get(key):
                raise ConfigError(f"{said} by operator.{key}={there.get(key)}, not {here.get(key)}; {way}")


def run_weights(backbone: BackboneConfig) -> RunWeights | None:
    """Return the checkpoint of a run that ``backbone.checkpoint`` names; None: it names none, or another file."""
    path = Path(backbone.checkpoint or "")
    if path.suffix != ".pt" or not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # tensors are not read yet
    except Exception:  # the reader of weights says what is wrong with it
        return None
    if not isinstance(content, Mapping) or not {"identity", "fingerprint", "model", "spectrum"} <= content.keys():
        return None
    data = content.get("data") or {}
    classes, shape = data.get("classes") or (), data.get("shape") or (3,)  # checkpoints of version 0.1 have none
    return RunWeights(path, content["identity"], frozenset(content["spectrum"]), tuple(classes), int(shape[0]))
