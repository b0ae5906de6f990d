"""Plain-loop float64 references. They share no code with convnn and are written from the definitions.

Everything is torch float64 on single tokens, so that autograd gives the reference gradients as well.
"""

import math

import torch


def _norm(v):
    return v / v.norm().clamp_min(1e-12)


def _likeness(a, b, kind):
    if kind == "cosine":
        return float((_norm(a) @ _norm(b)).detach())
    if kind == "dot":
        return float((a @ b).detach()) / math.sqrt(len(a))
    return -float(((a - b) ** 2).sum().detach())


def _differentiable_likeness(a, b, kind):
    if kind == "cosine":
        return _norm(a) @ _norm(b)
    if kind == "dot":
        return (a @ b) / math.sqrt(len(a))
    return -((a - b) ** 2).sum()


def _pick(query, queries, keys, where, candidates, *, k, blend, similarity, metric, self_first, slots, window):
    """Return the indices of one query's neighbours.

    where: per token, (row, column) or None for a prefix token. window: ((kh, kw), (dh, dw)).
    """
    (kh, kw), (dh, dw) = window
    if where[query] is None:
        blend = 1.0
    likeness = {j: _likeness(queries[query], keys[j], similarity) for j in candidates} if blend > 0 else {}
    low, high = (min(likeness.values()), max(likeness.values())) if likeness else (0, 1)

    on_grid = [w for w in where if w is not None]
    extent = max(1, *(max(w[axis] for w in on_grid) for axis in (0, 1)))

    def separation(j):
        if where[j] is None:
            return math.inf
        steps = []
        far = max(r + c for r, c in on_grid) + 2
        for axis, d in ((0, dh), (1, dw)):
            delta = abs(where[query][axis] - where[j][axis])
            steps.append(delta / d + (far if delta % d else 0))
        rh, rw = kh // 2, kw // 2
        if rh != rw:
            steps[0] *= max(rh, rw) / rh if rh else far
            steps[1] *= max(rh, rw) / rw if rw else far
        return max(steps) if metric == "chebyshev" else math.hypot(*steps)

    def score(j):
        if blend == 1:
            return likeness[j]
        if blend == 0:
            return -separation(j)
        return blend * (likeness[j] - low) / max(high - low, 1e-300) - (1 - blend) * separation(j) / extent

    ranked = sorted(candidates, key=lambda j: (-score(j), j))
    if self_first:
        ranked = [query] + [j for j in ranked if j != query]
    chosen = ranked[:k]
    if slots == "raster":
        return sorted(chosen)
    return _into_window(query, chosen, where, window) if slots == "window" else chosen


def _into_window(query, chosen, where, window):
    """Neighbours inside the window take their tap's slot (nearest tap first), the others the free slots in order."""
    (kh, kw), (dh, dw) = window
    rh, rw = kh // 2, kw // 2
    offsets = [(r, c) for r in range(-rh, rh + 1) for c in range(-rw, rw + 1)]
    sh, sw = (1, 1) if rh == rw else (max(rh, rw) / rh if rh else 99, max(rh, rw) / rw if rw else 99)
    offsets.sort(key=lambda o: max(abs(o[0]) * sh, abs(o[1]) * sw))  # stable: raster order within a ring
    slots = [None] * len(chosen)
    outside = []
    for j in chosen:
        offset = (where[j][0] - where[query][0], where[j][1] - where[query][1])
        taps = [i for i, o in enumerate(offsets[: len(chosen)]) if (o[0] * dh, o[1] * dw) == offset]
        if taps:
            slots[taps[0]] = j
        else:
            outside.append(j)
    for j in outside:
        slots[slots.index(None)] = j
    return slots


def _weigh(query, chosen, queries, keys, weighting, temperature, similarity):
    if weighting == "ones":
        return [1.0] * len(chosen)
    scores = [_differentiable_likeness(queries[query], keys[j], similarity) / temperature for j in chosen]
    return torch.softmax(torch.stack(scores), 0)


def convnn2d(
    x,
    weight,
    bias,
    *,
    k,
    kernel,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    blend=1.0,
    similarity="cosine",
    metric="chebyshev",
    pad_candidates=True,
    self_first=True,
    slots="rank",
    weighting="ones",
    temperature=1.0,
    candidates=None,
):
    """Neighbour convolution of (B, C, h, w) with weight (O, C / groups, K); ``candidates``: padded-map indices."""
    batch, channels, height, width = x.shape
    out_channels = weight.shape[0]
    rows, cols = height + 2 * padding[0], width + 2 * padding[1]
    out_rows = (rows - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_cols = (cols - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    where = [(r, c) for r in range(rows) for c in range(cols)]

    def is_pad(r, c):
        return not (padding[0] <= r < rows - padding[0] and padding[1] <= c < cols - padding[1])

    if candidates is None:
        candidates = [j for j, (r, c) in enumerate(where) if pad_candidates or blend < 1 or not is_pad(r, c)]
    images = []
    for b in range(batch):
        tokens = []
        for r, c in where:
            zero = x.new_zeros(channels)
            tokens.append(zero if is_pad(r, c) else x[b, :, r - padding[0], c - padding[1]])
        outputs = []
        for i in range(out_rows):
            for j in range(out_cols):
                r = i * stride[0] + dilation[0] * (kernel[0] // 2)
                c = j * stride[1] + dilation[1] * (kernel[1] // 2)
                query = r * cols + c
                chosen = _pick(
                    query,
                    tokens,
                    tokens,
                    where,
                    candidates,
                    k=k,
                    blend=blend,
                    similarity=similarity,
                    metric=metric,
                    self_first=self_first,
                    slots=slots,
                    window=(kernel, dilation),
                )
                rho = _weigh(query, chosen, tokens, tokens, weighting, temperature, similarity)
                y = [x.new_zeros(()) if bias is None else bias[o] for o in range(out_channels)]
                for o in range(out_channels):
                    size = channels // groups
                    first = (o // (out_channels // groups)) * size
                    for slot, token in enumerate(chosen):
                        y[o] = y[o] + rho[slot] * (weight[o, :, slot] @ tokens[token][first : first + size])
                outputs.append(torch.stack(y))
        images.append(torch.stack(outputs).T.reshape(out_channels, out_rows, out_cols))
    return torch.stack(images)


def convnn_attention(
    x,
    qkv_weight,
    qkv_bias,
    proj_weight,
    proj_bias,
    slot_weight,
    *,
    heads,
    k,
    blend=1.0,
    grid=None,
    prefix=0,
    similarity="dot",
    metric="chebyshev",
    self_first=False,
    slots="rank",
    weighting="softmax",
    temperature=1.0,
    candidates=None,
):
    """Neighbour attention of (B, N, C); ``slot_weight`` (D, K) or None; ``candidates``: token indices."""
    batch, n, channels = x.shape
    d = channels // heads
    height, width = grid or (1, n - prefix)
    where = [None] * prefix + [(r, c) for r in range(height) for c in range(width)]
    candidates = list(range(n)) if candidates is None else candidates
    out = []
    for b in range(batch):
        projected = [qkv_weight @ x[b, t] + (0 if qkv_bias is None else qkv_bias) for t in range(n)]
        rows = []
        for t in range(n):
            mixed = []
            for h in range(heads):
                q, key, v = (
                    [p[part * channels + h * d : part * channels + (h + 1) * d] for p in projected] for part in range(3)
                )
                chosen = _pick(
                    t,
                    q,
                    key,
                    where,
                    candidates,
                    k=k,
                    blend=blend,
                    similarity=similarity,
                    metric=metric,
                    self_first=self_first,
                    slots=slots,
                    window=((1, 1), (1, 1)),
                )
                rho = _weigh(t, chosen, q, key, weighting, temperature, similarity)
                total = 0
                for slot, token in enumerate(chosen):
                    scale = 1.0 if slot_weight is None else slot_weight[:, slot]
                    total = total + rho[slot] * scale * v[token]
                mixed.append(total)
            y = proj_weight @ torch.cat(mixed)
            rows.append(y if proj_bias is None else y + proj_bias)
        out.append(torch.stack(rows))
    return torch.stack(out)
