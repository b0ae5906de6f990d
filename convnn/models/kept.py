"""What a replacement keeps of a layer beside its function; what would be lost is an error that names it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import lru_cache
from typing import Any

from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convnn.errors import ConfigError
from convnn.nn.adapters.layer import AdaptedAttention
from convnn.nn.convolution import computes_weight

_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_CONVOLUTIONS = (nn.Conv2d, nn.Conv1d)


def check_replaceable(name: str, layer: nn.Module) -> None:
    """Raise ConfigError for a layer with something attached to it that its replacement would lose.

    What computes the weight of a convolution is ``convnn.nn.convolution``'s matter.
    """
    for module in layer.modules():
        if "forward" in vars(module):
            raise ConfigError(f"'{name}' has a forward pass of its own, set on it after it was built; exclude it")
        if not isinstance(module, _CONVOLUTIONS):
            _check_weight(name, module)
        pruned = any(type(h).__module__ == "torch.nn.utils.prune" for h in module._forward_pre_hooks.values())
        if pruned:
            raise ConfigError(f"'{name}' is pruned; call torch.nn.utils.prune.remove first, or exclude it")
        for kind in _HOOKS:
            if any(not computes_weight(hook) for hook in getattr(module, kind, {}).values()):
                raise _losing(name, kind.strip("_").replace("_", " "))
        for which, tensor in module.named_parameters(recurse=False):
            for kind in _TENSOR_HOOKS:
                if getattr(tensor, kind, None):
                    raise _losing(name, f"{kind.strip('_').replace('_', ' ')} of its {which}")


def check_called(model: nn.Module, name: str) -> None:
    """Raise ConfigError for a convolution that the model never calls, but convolves with its weight itself."""
    around, _, leaf = name.rpartition(".")
    parent = model.get_submodule(around)
    kind: Any = type(parent)
    if leaf in _convolved_by_hand(kind):
        raise ConfigError(
            f"'{name}' is not called: the forward pass of {type(parent).__name__} convolves with its weight; "
            "exclude it (swap.exclude)"
        )


@lru_cache
def _convolved_by_hand(kind: Any) -> frozenset[str]:
    """Return the attributes whose weight a class's own ``forward`` passes to a function such as ``F.conv2d``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):  # no source, of what was made otherwise
        return frozenset()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    by_hand = [c for c in calls if ast.unparse(c.func).rpartition(".")[2] in ("conv1d", "conv2d", "_conv_forward")]
    given = (ast.unparse(a) for c in by_hand for a in [*c.args, *(k.value for k in c.keywords)])
    found = (re.search(r"\bself\.(\w+)\.weight\b", text) for text in given)
    return frozenset(match[1] for match in found if match)


def _losing(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"'{name}' has {what}, which its replacement would lose; register them after the swap, or exclude it "
        "(swap.exclude)"
    )


def _check_weight(name: str, module: nn.Module) -> None:
    """Raise ConfigError for a weight that something computes, such as the old weight_norm before each forward pass."""
    norm: Any = next((h for h in module._forward_pre_hooks.values() if computes_weight(h)), None)
    if norm is not None:
        remove = "remove_" + type(norm).__name__.replace("Norm", "_norm").lower()
        raise ConfigError(f"'{name}' is normalised by a hook of torch.nn.utils; call torch.nn.utils.{remove} first")
    if parametrize.is_parametrized(module):
        kept = "torch.nn.utils.parametrize.remove_parametrizations"
        raise ConfigError(f"'{name}' has a parametrized {next(iter(module.parametrizations))}; call {kept} first")  # type: ignore[arg-type]


def like(old: nn.Module, plain: nn.Module, new: nn.Module, name: str) -> nn.Module:
    """Return the replacement: in the layer's mode, where and of what precision its weights were, frozen if it was.

    Args:
        old: the layer.
        plain: what the replacement was built from; the layer itself, or a plain one that is its function.
        new: the replacement.
        name: of the layer.

    Raises:
        ConfigError: if some of the layer's parameters are frozen and some are not, and the replacement has others; if
            they are on several devices or of several precisions; or if the layer has buffers that would be lost.
    """
    _check_buffers(plain, new, name)
    places = {(p.device, p.dtype) for p in plain.parameters()}
    if len(places) > 1:
        told = " and ".join(sorted(f"{dtype} on {device}".removeprefix("torch.") for device, dtype in places))
        raise ConfigError(f"'{name}' has parameters of {told}; a replacement has those of one kind: exclude it")
    for device, dtype in places:
        new.to(device, dtype)
    new.train(old.training)
    frozen = {n: not p.requires_grad for n, p in old.named_parameters()}
    if not any(frozen.values()):
        return new
    if all(frozen.values()):
        return new.requires_grad_(False)
    if isinstance(new, AdaptedAttention):  # whose copy of the layer is frozen as that is
        return new
    own = dict(new.named_parameters())
    if own.keys() - frozen.keys() or any(f for n, f in frozen.items() if n not in own):
        names = ", ".join(n for n, f in frozen.items() if f)
        raise ConfigError(
            f"'{name}' has frozen parameters ({names}) beside others; freeze those of its replacement after the swap"
        )
    for parameter, f in frozen.items():
        own[parameter].requires_grad_(not f)
    return new


def _check_buffers(plain: nn.Module, new: nn.Module, name: str) -> None:
    """Raise ConfigError for buffers that the replacement lacks, of layers that have none of their own.

    Layers of other kinds may have buffers for what their replacement does otherwise, such as indices of positions.
    """
    if not isinstance(plain, (*_CONVOLUTIONS, Attention)):
        return
    kept: dict[str, Tensor] = dict(new.named_buffers())
    lost = [n for n, _ in plain.named_buffers() if not any(own == n or own.endswith(f".{n}") for own in kept)]
    if lost:
        raise ConfigError(
            f"'{name}' has the buffer {lost[0]}, which its replacement would lose; exclude it (swap.exclude)"
        )
