"""Hybrid branching: neighbours for some output channels, the replaced kind of layer for the rest.

Shapes: B batch, N tokens, C input and O output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.config.schema import OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.attention import ConvNNAttention, check_attention, copy_norm, init_linear, refuse_mask
from convnn.nn.base import Site, pair
from convnn.nn.conv import ConvNN2d
from convnn.nn.convolution import SAME, check_conv, make_conv
from convnn.ops.neighborhood import Neighborhood, same_draws


def _split(total: int, ratio: float, name: str) -> int:
    """Return the channels of the neighbour branch, int(ratio * total) as in the paper."""
    own = int(ratio * total)
    if (own == 0 and ratio > 0) or (own == total and ratio < 1):
        raise ConfigError(
            f"operator.branch_ratio={ratio:g} leaves a branch of '{name}' without any of its {total} channels; "
            "use a ratio nearer to 0.5, or 0 or 1"
        )
    return own


def _dense_kernel(conv: nn.Conv2d) -> Tensor:
    """Return the kernel over all input channels (O, C, kh, kw) of a grouped convolution."""
    own = conv.weight.unflatten(0, (conv.groups, -1))  # (G, O / G, C / G, kh, kw)
    dense = own.new_zeros(*own.shape[:2], conv.groups, *own.shape[2:])
    groups = torch.arange(conv.groups)
    dense[groups, :, groups] = own
    return dense.flatten(0, 1).flatten(1, 2)


class _Hybrid(nn.Module):
    """A layer with a neighbour branch, which may be None."""

    neighbors: Any

    def neighborhood(self, x: Tensor, *, blend: float | None = None) -> Neighborhood:
        """Return what the neighbour branch chooses, at its own blend or another.

        Raises:
            ValueError: if there is no neighbour branch.
        """
        if self.neighbors is None:
            raise ValueError("branch_ratio=0 leaves no neighbour branch that could be asked")
        return self.neighbors.neighborhood(x, blend=blend)

    def _with_neighbors(self, x: Tensor) -> tuple[Tensor, Neighborhood]:
        with same_draws(x.device):
            found = self.neighborhood(x)
        return self.forward(x), found


class HybridConvNN2d(_Hybrid):
    """Hybrid branching: some output channels from neighbours, the rest from a convolution, then a 1x1 convolution.

    Both branches read all input channels. A ratio of 0 or 1 keeps one branch and the 1x1 convolution.

    Args:
        neighbors: the neighbour branch, or None.
        conv: the convolution branch, or None.
        fuse: end with the 1x1 convolution.

    Shape:
        (B, C, h, w) -> (B, O, h', w'), O the sum of both branches' output channels.
    """

    def __init__(self, neighbors: ConvNN2d | None, conv: nn.Conv2d | None, fuse: bool = True) -> None:
        super().__init__()
        if neighbors is None and conv is None:
            raise ValueError("a hybrid layer needs at least one branch")
        self.neighbors, self.conv = neighbors, conv
        out = sum(branch.out_channels for branch in (neighbors, conv) if branch is not None)
        self.pointwise = nn.Conv2d(out, out, 1) if fuse else None

    def forward(self, x: Tensor, return_neighbors: bool = False) -> Any:
        """(B, C, h, w) -> (B, O, h', w'); with ``return_neighbors`` the neighbour branch's Neighborhood too."""
        if return_neighbors:
            return self._with_neighbors(x)
        branches = [branch(x) for branch in (self.neighbors, self.conv) if branch is not None]
        y = torch.cat(branches, dim=1) if len(branches) > 1 else branches[0]
        return y if self.pointwise is None else self.pointwise(y)

    @torch.no_grad()
    def to_layer(self) -> nn.Conv2d:
        """Return the one convolution that both branches and the 1x1 make.

        Raises:
            ValueError: if the neighbour branch is no convolution, or the branches have different windows.
        """
        parts = [] if self.neighbors is None else [self.neighbors.to_layer()]
        parts += [] if self.conv is None else [self.conv]
        first, paddings = parts[0], [check_conv(part, Site("the hybrid's branch")) for part in parts]
        windows = {(part.kernel_size, padding) for part, padding in zip(parts, paddings, strict=True)}
        if len(windows) > 1:
            raise ValueError("its branches have different windows")
        kernel, stride, dilation = (pair(v) for v in (first.kernel_size, first.stride, first.dilation))
        weight = torch.cat([_dense_kernel(p) for p in parts])
        bias = torch.cat([p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts])
        if self.pointwise is not None:
            mix = self.pointwise.weight[:, :, 0, 0]
            assert self.pointwise.bias is not None
            weight, bias = torch.einsum("op,pchw->ochw", mix, weight), mix @ bias + self.pointwise.bias
        merged = make_conv(first.in_channels, len(weight), kernel, stride, paddings[0], dilation)
        merged.to(weight.device, weight.dtype)
        assert merged.bias is not None
        merged.weight.copy_(weight)
        merged.bias.copy_(bias)
        return merged.train(self.training)

    @classmethod
    def from_layer(cls, layer: nn.Conv2d, config: OperatorConfig, init: str, site: Site) -> HybridConvNN2d:
        """Build the replacement of a convolution; ``transfer`` splits its kernel and starts the 1x1 as identity."""
        padding = check_conv(layer, site)
        kernel = pair(layer.kernel_size)
        if config.branch_kernel is not None and pair(config.branch_kernel) != kernel:
            if init == "transfer":
                raise ConfigError("swap.init=transfer keeps the kernel; leave operator.branch_kernel at null")
            kernel, stride = pair(config.branch_kernel), pair(layer.stride)
            if stride != (1, 1) and config.branch_kernel % 2 == 0:
                raise ConfigError(
                    f"operator.branch_kernel={config.branch_kernel} is even and '{site.name}' has a stride"
                )
            if any(m % 2 == 0 for m in pair(layer.kernel_size)):
                raise ConfigError(f"'{site.name}' has an even kernel; leave operator.branch_kernel at null")
            dilation = pair(layer.dilation)
            if stride != (1, 1) and padding != SAME:
                padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
            else:
                padding = SAME
        if config.branch_ratio is None:
            raise ConfigError("operator.branch_ratio=null: a hybrid operator needs a ratio in [0, 1]")
        if layer.groups != 1:
            raise ConfigError(f"'{site.name}' has groups={layer.groups}; a hybrid needs 1: exclude it (swap.exclude)")
        own = _split(layer.out_channels, config.branch_ratio, site.name)
        rest = layer.out_channels - own
        neighbors = ConvNN2d.from_layer(layer, config, init, site, out_channels=own) if own else None
        conv = None
        bias = config.bias if config.branch_bias is None else config.branch_bias
        if rest:
            conv = make_conv(
                layer.in_channels,
                rest,
                kernel,
                pair(layer.stride),
                padding,
                pair(layer.dilation),
                bias=layer.bias is not None if bias is None else bias,
            )
        hybrid = cls(neighbors, conv, config.branch_fuse).to(layer.weight.device, layer.weight.dtype)
        if init == "transfer":
            with torch.no_grad():
                if hybrid.conv is not None:
                    hybrid.conv.weight.copy_(layer.weight[own:])
                    if hybrid.conv.bias is not None and layer.bias is not None:
                        hybrid.conv.bias.copy_(layer.bias[own:])
                if hybrid.pointwise is not None:
                    nn.init.dirac_(hybrid.pointwise.weight)
                    nn.init.zeros_(hybrid.pointwise.bias)  # type: ignore[arg-type]
        return hybrid


class HybridConvNNAttention(_Hybrid):
    """Hybrid branching: some output channels from neighbours, the rest from full attention, then a linear layer.

    The branches read all channels with projections of their own, or each as many as it gives. A ratio of 0 or 1 keeps
    one branch.

    Args:
        neighbors: the neighbour branch, or None.
        attention: the attention branch, or None.
        split: the neighbour branch reads the first channels alone, the attention branch the rest.

    Shape:
        (B, N, C) -> (B, N, O), O the sum of both branches' output channels.
    """

    def __init__(self, neighbors: ConvNNAttention | None, attention: Attention | None, split: bool = False) -> None:
        super().__init__()
        if neighbors is None and attention is None:
            raise ValueError("a hybrid layer needs at least one branch")
        self.neighbors, self.attention = neighbors, attention
        self.split = split and neighbors is not None and attention is not None
        out = sum(branch.proj.out_features for branch in (neighbors, attention) if branch is not None)
        self.pointwise = nn.Linear(out, out)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, return_neighbors: bool = False
    ) -> Any:
        """(B, N, C) -> (B, N, O), as ``ConvNNAttention``. A mask is refused rather than ignored."""
        refuse_mask(attn_mask, is_causal)
        if return_neighbors:
            return self._with_neighbors(x)
        parts = [branch for branch in (self.neighbors, self.attention) if branch is not None]
        widths = [part.qkv.in_features for part in parts]
        inputs = x.split(widths, dim=-1) if self.split else [x] * len(parts)
        branches = [part(own) for part, own in zip(parts, inputs, strict=True)]
        return self.pointwise(torch.cat(branches, dim=-1) if len(branches) > 1 else branches[0])

    @classmethod
    def from_layer(cls, layer: Attention, config: OperatorConfig, init: str, site: Site) -> HybridConvNNAttention:
        """Build the replacement of timm's attention; ``transfer`` splits the output projection."""
        check_attention(layer, site)
        if config.branch_ratio is None:
            raise ConfigError("operator.branch_ratio=null: a hybrid operator needs a ratio in [0, 1]")
        total = layer.proj.out_features
        own = _split(total, config.branch_ratio, site.name)
        if config.branch_input == "split" and 0 < own < total:
            return cls._of_halves(layer, config, init, site, own)
        neighbors = ConvNNAttention.from_layer(layer, config, init, site, dim_out=own) if own else None
        attention = None
        if own < total:
            attention = Attention(
                layer.attn_dim,
                layer.num_heads,
                dim_out=total - own,
                qkv_bias=layer.qkv.bias is not None,
                proj_bias=layer.proj.bias is not None if config.bias is None else config.bias,
                attn_drop=layer.attn_drop.p,
                proj_drop=layer.proj_drop.p,
            )
            attention.to(layer.qkv.weight.device, layer.qkv.weight.dtype)
            attention.q_norm, attention.k_norm = copy_norm(layer.q_norm, init), copy_norm(layer.k_norm, init)
            init_linear(attention.qkv, layer.qkv, init)
            init_linear(attention.proj, layer.proj, init, first=own)
        hybrid = cls(neighbors, attention).to(layer.qkv.weight.device, layer.qkv.weight.dtype)
        if init == "transfer":
            nn.init.eye_(hybrid.pointwise.weight)
            nn.init.zeros_(hybrid.pointwise.bias)
        return hybrid

    @classmethod
    def _of_halves(
        cls, layer: Attention, config: OperatorConfig, init: str, site: Site, own: int
    ) -> HybridConvNNAttention:
        """Build branches that are as wide as what they read."""
        total, heads = layer.proj.out_features, layer.num_heads
        if init == "transfer":
            raise ConfigError(
                f"swap.init=transfer: the branches of '{site.name}' would read some of its channels each; set "
                "operator.branch_input=all or swap.init=fresh"
            )
        if own % heads or total % heads or not isinstance(layer.q_norm, nn.Identity):
            raise ConfigError(
                f"operator.branch_input=split: the {heads} heads of '{site.name}' must divide {own} and {total - own} "
                "channels, and have no norms of their own; set operator.branch_ratio, or operator.branch_input=all"
            )
        bias = layer.proj.bias is not None if config.bias is None else config.bias
        options: dict[str, Any] = {"qkv_bias": layer.qkv.bias is not None, "proj_bias": bias}
        options |= {"attn_drop": layer.attn_drop.p, "proj_drop": layer.proj_drop.p}
        parts = [Attention(width, heads, **options) for width in (own, total - own)]
        for linear in (parts[1].qkv, parts[1].proj):
            init_linear(linear, linear, init)
        hybrid = cls(ConvNNAttention.from_layer(parts[0], config, init, site), parts[1], split=True)
        return hybrid.to(layer.qkv.weight.device, layer.qkv.weight.dtype)

    def neighborhood(self, x: Tensor, *, blend: float | None = None) -> Neighborhood:
        """Return what the neighbour branch chooses in a sequence (B, N, C), at its own blend or another."""
        return super().neighborhood(x[..., : self.neighbors.dim] if self.split else x, blend=blend)
