"""The feature maps of a network by depth. Shapes: B batch, C channels, N tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from convnn.analysis.base import NotApplicable
from convnn.models.sites import network_layers

_LISTS = (nn.Sequential, nn.ModuleList)


def depths(model: nn.Module) -> list[str]:
    """Return the names of the modules whose outputs are a network's depth, in forward order.

    Blocks (of a ResNet, ViT, Swin, ...) where layers that may be replaced stand in one, else the layers themselves,
    such as those of a VGG or a stem.

    Raises:
        NotApplicable: if there is none.
    """
    found: list[str] = []
    for layer in network_layers(model):
        name = _block_of(model, layer)
        if name not in found:
            found.append(name)
    if not found:
        raise NotApplicable("it has no convolution and no attention that could be replaced, so no depth")
    return found


def _block_of(model: nn.Module, layer: str) -> str:
    """Return the block that a layer stands in: the outermost child of a list that holds no list of blocks itself."""
    parts = layer.split(".")
    for i in range(1, len(parts)):
        parent = model.get_submodule(".".join(parts[:i]))
        if isinstance(parent, _LISTS):
            name = ".".join(parts[: i + 1])
            child = model.get_submodule(name)
            inner = isinstance(child, _LISTS) or any(
                isinstance(getattr(child, n, None), _LISTS) for n in ("blocks", "layers")
            )
            if not inner:
                return name
    return layer


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what modules return while the model is called, by name: the last call counts."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        found[name] = output[0] if isinstance(output, (tuple, list)) else output

    with ExitStack() as stack:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: keep(name, out))
            stack.callback(hook.remove)
        yield found


def feature_maps(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Return the outputs of modules on images as maps (B, C, h, w), by name, without prefix tokens such as CLS."""
    with outputs_of(model, names) as found:
        model(images)
    return {name: as_map(model, found[name]) for name in names if name in found}


def as_map(model: nn.Module, output: Tensor) -> Tensor:
    """Return a module's output as a map (B, C, h, w).

    Raises:
        NotApplicable: if its tokens lie on no grid that is known.
    """
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else output
    if output.ndim == 3:
        tokens = output[:, int(getattr(model, "num_prefix_tokens", 0)) :]
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        side = round(tokens.shape[1] ** 0.5)
        rows, columns = grid if grid and grid[0] * grid[1] == tokens.shape[1] else (side, side)
        if rows * columns == tokens.shape[1]:
            return tokens.transpose(1, 2).unflatten(2, (rows, columns))
    raise NotApplicable(f"features of {tuple(output.shape)} are no map of tokens")
