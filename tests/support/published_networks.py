"""The paper's networks, written from its description and the published layers' behaviour, in plain float64.

They take the weights of a network of ours and share no formula with it. Each is a forward pass at evaluation; VGG's
also while training, without dropout.
"""

import math

import torch
import torch.nn.functional as F


def fixed_subset(total, count):
    """The tokens that a forward pass draws, in place of random ones: (count,)."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(1000 * total + count))[:count].sort().values


def best(score, k):
    """Columns of the k largest scores to 9 decimals, of equal ones the first: (..., M) -> (..., k)."""
    return torch.sort(-(score / 1e-9).round(), dim=-1, stable=True).indices[..., :k]


def below(weights, prefix):
    """Those of the weights whose names begin so, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def rows_of(x, index):
    """(B, N, C), (B, Q, K) -> (B, Q, K, C)."""
    return torch.stack([image[own] for image, own in zip(x, index, strict=True)])


# ---------------------------------------------------------------------------------------------- ViT with one head


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def places(tokens, dim):
    """Sine-cosine positions, one place at a time."""
    table = torch.zeros(tokens, dim, dtype=torch.float32)
    for place in range(tokens):
        for i in range(dim // 2):
            angle = place / 10000 ** (2 * i / dim)
            table[place, 2 * i], table[place, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table.double()


def attend(x, qkv, slots, kind, k, count, pointwise=None):
    """Softmax-weighted sums of the chosen tokens: (B, N, C) -> (B, N, C)."""
    n, dim = x.shape[1:]
    q, key, v = (x @ w.t() for w in qkv.split(dim))
    score = q @ key.transpose(1, 2) / math.sqrt(dim)
    if kind == "attention":
        return score.softmax(-1) @ v
    if kind == "kvt":
        border = score.sort(-1).values[..., -k, None]
        return torch.where(score >= border, score, -math.inf).softmax(-1) @ v
    if kind == "all":
        index = best(score, k)
        weights = score.gather(-1, index)
    else:  # own token first, scored 1, and again among the sample, scored -0.1
        whole = count > n
        if kind == "random":
            sample = torch.arange(n) if whole else fixed_subset(n, count)
        else:
            sample = torch.linspace(0, n - 1, count).long()
        score = score[..., sample].clone()
        score[:, sample, torch.arange(len(sample))] = -0.1
        found = best(score, k - 1)
        own = torch.arange(n)[None, :, None].expand(len(x), n, 1)
        index = torch.cat([own, sample[found]], -1)
        weights = torch.cat([torch.ones_like(score[..., :1]), score.gather(-1, found)], -1)
    chosen = rows_of(v, index) * weights.softmax(-1)[..., None]  # (B, N, K, C)
    if slots.ndim == 3:
        return torch.einsum("bnkc,ock->bno", chosen, slots)
    y = (chosen * slots.t()).sum(2)
    return y if pointwise is None else y @ pointwise.t()


def vit(state, x, kind, k=9, count=32):
    """Logits of a ViT with patches of 16, its weights by timm's names: (B, 3, h, w) -> (B, classes)."""
    w = {name: value.double() for name, value in state.items()}
    patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).t() + w["patch_embed.proj.bias"]
    x = layer_norm(x, w["patch_embed.norm.weight"], w["patch_embed.norm.bias"])
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + places(*x.shape[1:])
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(depth):
        b = below(w, f"blocks.{i}.")
        y = layer_norm(x, b["norm1.weight"], b["norm1.bias"])
        if kind == "hybrid":  # the first channels to neighbours, the rest to full attention, and a linear layer
            near, full = below(b, "attn.neighbors."), below(b, "attn.attention.")
            first, rest = y.split([len(near["proj.weight"]), len(full["proj.weight"])], dim=-1)
            first = attend(first, near["qkv.weight"], near["slot_weight"], "all", k, count) @ near["proj.weight"].t()
            rest = attend(rest, full["qkv.weight"], None, "attention", k, count) @ full["proj.weight"].t()
            x = x + torch.cat([first, rest], -1) @ b["attn.pointwise.weight"].t() + b["attn.pointwise.bias"]
        else:
            own = b["attn.qkv.weight"], b.get("attn.slot_weight"), kind, k, count, b.get("attn.pointwise.weight")
            x = x + attend(y, *own) @ b["attn.proj.weight"].t()
        y = layer_norm(x, b["norm2.weight"], b["norm2.bias"]) @ b["mlp.fc1.weight"].t() + b["mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ b["mlp.fc2.weight"].t() + b["mlp.fc2.bias"]
    return x[:, 0] @ w["head.weight"].t() + w["head.bias"]


# --------------------------------------------------------------------------------------------- VGG-11 of hybrids


def with_coordinates(x):
    """Column and row of each pixel, from -1 to 1: (B, C, h, w) -> (B, 2, h, w)."""
    h, w = x.shape[2:]
    rows, cols = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (h, w)), indexing="ij")
    return torch.stack([cols, rows]).expand(len(x), 2, h, w)


def sheared(height, width, side):
    """The authors' grid on a map of a ring: floored points, numbered as if there were no ring: (side^2,)."""
    numbers = [
        int(c) * height + int(r)
        for r in torch.linspace(0, height - 1, side)
        for c in torch.linspace(0, width - 1, side)
    ]
    return torch.tensor(sorted(numbers))


def neighbours(x, weight, bias, k, *, position=False, coordinates=False, sample=None, grid=None):
    """Full convolution over the k most similar pixels, own first, of a map in a ring of zeros.

    (B, C, h, w) -> (B, O, h, w).
    """
    h, w = x.shape[2:]
    x = F.pad(x, (1, 1, 1, 1))
    near = x
    if position:
        spread = x.flatten(1).std(1)[:, None, None, None]
        near = torch.cat([0.5 * x / spread, 0.5 * with_coordinates(x)], 1)
    near = near.flatten(2).transpose(1, 2)
    unit = near / near.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    score, n = unit @ unit.transpose(1, 2), near.shape[1]
    own = torch.arange(n)
    if (sample is None or sample > n) and (grid is None or grid > h):
        score[:, own, own] = 1.1
        index = best(score, k)
    else:
        tokens = sheared(h, w, grid) if grid else fixed_subset(n, sample)
        score = score[..., tokens]
        score[:, tokens, torch.arange(len(tokens))] = -0.1
        index = torch.cat([own[None, :, None].expand(len(x), n, 1), tokens[best(score, k - 1)]], -1)
    values = torch.cat([x, with_coordinates(x)], 1) if coordinates else x
    chosen = rows_of(values.flatten(2).transpose(1, 2), index)  # (B, N, K, C)
    y = torch.einsum("bnkc,ock->bon", chosen, weight) + bias[:, None]
    return y.unflatten(2, (h + 2, w + 2))[:, :, 1:-1, 1:-1]


def learned(x, w, k, euclidean=False):
    """Depthwise sums of projected pixels weighed by a softmax, then two 1x1: (B, C, h, w) -> (B, O, h, w).

    By distance the nearest are chosen, and the softmax is of their squared distances.
    """
    h, width = x.shape[2:]
    tokens = F.pad(x, (1, 1, 1, 1)).flatten(2).transpose(1, 2)
    q, key, v = (tokens @ part.t() for part in w["qkv.weight"].split(x.shape[1]))
    own = torch.arange(tokens.shape[1])
    if euclidean:
        score = (q[:, :, None] - key[:, None]).pow(2).sum(-1)
        score[:, own, own] = -0.1
    else:
        unit_q, unit_k = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (q, key))
        score = unit_q @ unit_k.transpose(1, 2)
        score[:, own, own] = 1.1
    index = best(-score if euclidean else score, k)
    rho = score.gather(-1, index).softmax(-1)
    y = (rows_of(v, index) * rho[..., None] * w["weight"][:, 0].t()).sum(2) + w["slot_bias"]
    y = (y @ w["pointwise.weight"].t() + w["pointwise.bias"]) @ w["proj.weight"].t()
    return y.transpose(1, 2).unflatten(2, (h + 2, width + 2))[:, :, 1:-1, 1:-1]


def folded(x, side):
    """Pixels of each side x side square become channels: (B, C, h, w) -> (B, C side^2, h / side, w / side)."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // side, side, w // side, side)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(b, -1, h // side, w // side)


def unfolded(x, side):
    """The inverse of ``folded``."""
    b, _, h, w = x.shape
    return x.reshape(b, -1, side, side, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, h * side, w * side)


def vgg11(state, x, k=9, shuffle=1, training=False, euclidean=False, **options):
    """Logits of a VGG-11 with hybrids, its weights by the names of timm and of the layers: (B, 3, 32, 32)."""
    w = {name: value.double() for name, value in state.items()}
    layout = (0, "M", 1, "M", 2, 3, "M", 4, 5, "M", 6, 7, "M")
    places = sorted({int(name.split(".")[1]) for name in w if name.endswith("pointwise.weight")})
    for entry in layout:
        if entry == "M":
            x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
            continue
        i = places[entry]
        b = {
            name.removeprefix(f"features.{i}."): value for name, value in w.items() if name.startswith(f"features.{i}.")
        }
        parts = []
        if "neighbors.qkv.weight" in b:
            parts.append(learned(x, below(b, "neighbors."), k, euclidean))
        elif "neighbors.weight" in b:
            own = neighbours(folded(x, shuffle), b["neighbors.weight"], b["neighbors.bias"], k, **options)
            parts.append(unfolded(own, shuffle))
        if "conv.weight" in b:
            parts.append(F.conv2d(x, b["conv.weight"], b["conv.bias"], padding="same"))
        x = torch.cat(parts, 1)
        x = torch.einsum("oc,bchw->bohw", b["pointwise.weight"].flatten(1), x) + b["pointwise.bias"][:, None, None]
        n = below(w, f"features.{i + 1}.")
        x = x.transpose(1, 3)
        mean, variance = n["running_mean"], n["running_var"]
        if training:
            mean = x.mean((0, 1, 2))
            variance = (x - mean).pow(2).mean((0, 1, 2))
        x = (x - mean) / (variance + 1e-5).sqrt() * n["weight"] + n["bias"]
        x = x.transpose(1, 3).clamp_min(0)
    x = x.expand(-1, -1, 7, 7).flatten(1)  # the 1 x 1 map, pooled up
    for name in ("pre_logits.fc1", "pre_logits.fc2"):
        x = (x @ w[f"{name}.weight"].flatten(1).t() + w[f"{name}.bias"]).clamp_min(0)
    return x @ w["head.fc.weight"].t() + w["head.fc.bias"]
