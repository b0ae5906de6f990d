"""Parts of a network that are not trained."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Iterable

from torch import nn

from convnn.config.keys import nearest
from convnn.errors import ConfigError


def freeze(model: nn.Module, globs: Iterable[str]) -> None:
    """Let the parameters that globs match ask for no gradient, and those in modules that they match.

    Batch normalisation in a matching module stays in evaluation mode whatever ``model.train()`` says: it normalises by
    the statistics that it has, and these stand still. Dropout and stochastic depth go on. A deep copy keeps
    that, a pickled model does not.

    Raises:
        ConfigError: for a glob that matches nothing, and if nothing is left to train.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    parameters = dict(model.named_parameters())
    for glob in globs:
        found = [module for name, module in modules.items() if fnmatch.fnmatchcase(name, glob)]
        single = [parameter for name, parameter in parameters.items() if fnmatch.fnmatchcase(name, glob)]
        if not found and not single:
            near = nearest(glob.rstrip(".*"), {*modules, *parameters})
            raise ConfigError(f"backbone.freeze={glob} matches no module or parameter of {type(model).__name__}{near}")
        for parameter in single:
            parameter.requires_grad_(False)
        for module in found:
            module.requires_grad_(False)
            for inner in module.modules():
                if getattr(inner, "running_mean", None) is not None:
                    _keep_evaluating(inner)
    if parameters and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("backbone.freeze leaves nothing to train; leave out the classifier at least")


def _keep_evaluating(module: nn.Module) -> None:
    """Let ``train()`` of this one module leave it in evaluation mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return type(self).train(self, False)

    module.train = types.MethodType(train, module)  # type: ignore[method-assign]
    module.eval()
