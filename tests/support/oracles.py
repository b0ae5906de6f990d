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


def _pick(
    query,
    queries,
    keys,
    where,
    candidates,
    *,
    k,
    blend,
    similarity,
    metric,
    self_first,
    slots,
    window,
    mix="sum",
    places=None,
    radius=None,
    margin=0,
):
    """Return the indices of one query's neighbours.

    where: per token, (row, column) or None for a prefix token. window: ((kh, kw), (dh, dw)). places: per token its
    (column, row) in [-1, 1], for ``mix="concat"``. radius: only tokens so near. margin: queries nearer to the edge
    measure from the token that far inside.
    """
    (kh, kw), (dh, dw) = window
    if where[query] is None:
        blend = 1.0
    on_grid = [w for w in where if w is not None]
    last = [max(w[axis] for w in on_grid) for axis in (0, 1)]
    extent = max(1, *last)

    def separation(j):
        if where[j] is None:
            return math.inf
        steps = []
        far = max(r + c for r, c in on_grid) + 2
        for axis, d in ((0, dh), (1, dw)):
            centre = min(max(where[query][axis], margin), last[axis] - margin)
            delta = where[j][axis] - centre
            lean = 0 if (kh, kw)[axis] % 2 else 0.25  # an even window reaches one tap further behind the query
            steps.append(abs(delta / d - lean) + (far if delta % d else 0))
        rh, rw = (m // 2 if m % 2 else m / 2 - 0.25 for m in (kh, kw))
        if rh != rw:
            steps[0] *= max(rh, rw) if rh else far
            steps[1] *= max(rh, rw) if rw else far
            steps = [steps[0] / (rh or 1), steps[1] / (rw or 1)]
        return max(steps) if metric == "chebyshev" else math.hypot(*steps)

    if radius is not None and where[query] is not None:
        candidates = [j for j in candidates if where[j] is None or separation(j) <= radius]
    if mix == "concat" and 0 < blend < 1:
        every = torch.stack(list(keys)).detach()
        sigma = float(((every - every.mean()) ** 2).sum() / (every.numel() - 1)) ** 0.5

        def joined(vectors, j):
            place = [0.0, 0.0] if where[j] is None else places[j]
            return torch.cat([vectors[j] * blend / sigma, (1 - blend) * torch.tensor(place, dtype=torch.float64)])

        queries, keys = {query: joined(queries, query)}, {j: joined(keys, j) for j in candidates}
        blend = 1.0
    likeness = {j: _likeness(queries[query], keys[j], similarity) for j in candidates} if blend > 0 else {}
    low, high = (min(likeness.values()), max(likeness.values())) if likeness else (0, 1)

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
    up, left = (kh + 1) // 2 - 1, (kw + 1) // 2 - 1
    offsets = [(r, c) for r in range(-up, kh - up) for c in range(-left, kw - left)]
    lh, lw = (0 if m % 2 else 0.25 for m in (kh, kw))
    rh, rw = kh // 2 - lh, kw // 2 - lw
    # In units of the window's reach; stable: raster order within a ring.
    offsets.sort(key=lambda o: max(abs(o[0] - lh) / rh if rh else 0, abs(o[1] - lw) / rw if rw else 0))
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
    return torch.softmax(torch.stack(scores), 0) if weighting == "softmax" else scores


def _spread(side):
    return [-1.0 if side == 1 else -1 + 2 * i / (side - 1) for i in range(side)]


def convnn2d(
    x,
    weight,
    bias,
    *,
    k,
    kernel,
    stride=(1, 1),
    padding=(0, 0),
    extra=(0, 0),
    dilation=(1, 1),
    groups=1,
    blend=1.0,
    similarity="cosine",
    metric="chebyshev",
    mix="sum",
    pad_candidates=True,
    self_first=True,
    slots="rank",
    weighting="ones",
    temperature=1.0,
    candidates=None,
    radius=None,
    aggregation="conv",
    coordinates=False,
    qkv=None,
    pointwise=None,
    proj=None,
):
    """Neighbour convolution of (B, C, h, w).

    weight: (O, C / groups, K), or for depthwise and separable one row (1, K) per output channel of that step.
    extra: rows and columns of zeros more at the bottom and the right. candidates: padded-map indices. qkv, pointwise,
    proj: matrices of the 1x1 layers before and after.
    """
    batch, channels, height, width = x.shape
    rows, cols = height + 2 * padding[0] + extra[0], width + 2 * padding[1] + extra[1]
    out_rows = (rows - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_cols = (cols - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    where = [(r, c) for r in range(rows) for c in range(cols)]
    places = [(_spread(cols)[c], _spread(rows)[r]) for r, c in where]

    def is_pad(r, c):
        return not (padding[0] <= r < padding[0] + height and padding[1] <= c < padding[1] + width)

    if candidates is None:
        candidates = [j for j, (r, c) in enumerate(where) if pad_candidates or blend < 1 or not is_pad(r, c)]
    images = []
    for b in range(batch):
        tokens = []
        for r, c in where:
            zero = x.new_zeros(channels)
            tokens.append(zero if is_pad(r, c) else x[b, :, r - padding[0], c - padding[1]])
        query_tokens, keys, values = tokens, tokens, tokens
        if qkv is not None:
            parts = [(qkv @ t).split(channels) for t in tokens]
            query_tokens, keys, values = ([p[i] for p in parts] for i in range(3))
        if coordinates:
            values = [torch.cat([v, torch.tensor(places[j], dtype=v.dtype)]) for j, v in enumerate(values)]
        outputs = []
        for i in range(out_rows):
            for j in range(out_cols):
                r = i * stride[0] + dilation[0] * ((kernel[0] + 1) // 2 - 1)
                c = j * stride[1] + dilation[1] * ((kernel[1] + 1) // 2 - 1)
                query = r * cols + c
                chosen = _pick(
                    query,
                    query_tokens,
                    keys,
                    where,
                    candidates,
                    k=k,
                    blend=blend,
                    similarity=similarity,
                    metric=metric,
                    self_first=self_first,
                    slots=slots,
                    window=(kernel, dilation),
                    mix=mix,
                    places=places,
                    radius=radius,
                )
                rho = _weigh(query, chosen, query_tokens, keys, weighting, temperature, similarity)
                block = [rho[slot] * values[token] for slot, token in enumerate(chosen)]
                if aggregation == "sum":
                    y = sum(block)
                elif aggregation == "max_relative":
                    largest = torch.stack([values[t] - values[query] for t in chosen]).max(0).values
                    y = torch.cat([values[query], largest])
                else:
                    y = _convolve(block, weight, groups)
                for matrix in (pointwise, proj):
                    y = y if matrix is None else matrix @ y
                outputs.append(y if bias is None else y + bias)
        images.append(torch.stack(outputs).T.reshape(-1, out_rows, out_cols))
    return torch.stack(images)


def _convolve(block, weight, groups):
    out, size, y = weight.shape[0], weight.shape[1], []
    for o in range(out):
        first = (o // (out // groups)) * size
        y.append(sum(weight[o, :, slot] @ v[first : first + size] for slot, v in enumerate(block)))
    return torch.stack(y)


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
    mix="sum",
    radius=None,
    border="nearest",
    pointwise=None,
):
    """Neighbour attention of (B, N, C); ``slot_weight`` (D, K), (D, D, K) or None; ``candidates``: token indices."""
    batch, n, channels = x.shape
    d = channels // heads
    height, width = grid or (1, n - prefix)
    half = math.isqrt(k) // 2
    ring, margin = (half if border == "zeros" else 0), (half if border == "shift" else 0)
    rows, cols = height + 2 * ring, width + 2 * ring
    where = [None] * prefix + [(r, c) for r in range(rows) for c in range(cols)]
    places = [None] * prefix + [(_spread(cols)[c], _spread(rows)[r]) for r, c in where[prefix:]]
    candidates = list(range(len(where))) if candidates is None else candidates
    # real[i]: the place of token i of the sequence among the tokens with the ring
    real = [j for j, w in enumerate(where) if w is None or (ring <= w[0] < rows - ring and ring <= w[1] < cols - ring)]
    out = []
    for b in range(batch):
        projected = [qkv_weight @ x[b, t] + (0 if qkv_bias is None else qkv_bias) for t in range(n)]
        tokens = []
        for t in range(n):
            mixed = []
            for h in range(heads):
                q, key, v = [[x.new_zeros(d)] * len(where) for _ in range(3)]
                for place, p in zip(real, projected, strict=True):
                    q[place], key[place], v[place] = (
                        p[part * channels + h * d : part * channels + (h + 1) * d] for part in range(3)
                    )
                chosen = _pick(
                    real[t],
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
                    mix=mix,
                    places=places,
                    radius=radius,
                    margin=margin,
                )
                rho = _weigh(real[t], chosen, q, key, weighting, temperature, similarity)
                total = 0
                for slot, token in enumerate(chosen):
                    if slot_weight is None:
                        part = v[token]
                    elif slot_weight.ndim == 3:
                        part = slot_weight[:, :, slot] @ v[token]
                    else:
                        part = slot_weight[:, slot] * v[token]
                    total = total + rho[slot] * part
                mixed.append(total if pointwise is None else pointwise @ total)
            y = proj_weight @ torch.cat(mixed)
            tokens.append(y if proj_bias is None else y + proj_bias)
        out.append(torch.stack(tokens))
    return torch.stack(out)


def reflected(place, side):
    """The place within 0 .. side - 1 that a place beyond it mirrors, border pixels not repeated."""
    while side > 1 and not 0 <= place < side:
        place = -place if place < 0 else 2 * (side - 1) - place
    return place if side > 1 else 0


def acmix(x, qkv, qkv_bias, position, mix, bias, alpha, beta, *, heads, kernel, stride, padding, window):
    """ACmix with shift kernels: F_out = alpha F_att + beta F_conv (arXiv 2111.14556, equations 6-12).

    The window mirrors the map at its border; the score is q_i (k_j + p_i - p_j), ``position`` (weight, bias) giving
    each place's p from its column and row, -1 to 1.
    """
    batch, _, height, width = x.shape
    out = qkv.shape[0] // 3
    d = out // heads
    out_rows = (height + 2 * padding - kernel) // stride + 1
    out_cols = (width + 2 * padding - kernel) // stride + 1
    y = x.new_zeros(batch, out, out_rows, out_cols)

    def p_at(row, col):
        place = [2 * n / (side - 1) - 1 if side > 1 else -1.0 for n, side in ((col, width), (row, height))]
        return position[0] @ x.new_tensor(place) + position[1]

    for b in range(batch):
        maps = torch.einsum("oc,chw->ohw", qkv, x[b]) + qkv_bias[:, None, None]
        q, k, v = (m.view(heads, d, height, width) for m in maps.split(out))
        for i in range(out_rows):
            for j in range(out_cols):
                r, c = i * stride + kernel // 2 - padding, j * stride + kernel // 2 - padding
                near = [
                    (reflected(rr, height), reflected(cc, width))
                    for rr in range(r - window // 2, r + window // 2 + 1)
                    for cc in range(c - window // 2, c + window // 2 + 1)
                ]
                attended = []
                for h in range(heads):
                    scores = torch.stack(
                        [
                            q[h, :, r, c] @ (k[h, :, rr, cc] + p_at(r, c) - p_at(rr, cc)) / math.sqrt(d)
                            for rr, cc in near
                        ]
                    )
                    p = torch.softmax(scores, 0)
                    attended.append(sum(p[n] * v[h, :, rr, cc] for n, (rr, cc) in enumerate(near)))
                convolved = []
                for o in range(out):
                    # output channel o belongs to head channel o // heads: f^(p,q) mixes the 3 H maps of that channel
                    channel, total = o // heads, 0
                    for t in range(kernel * kernel):
                        rr, cc = i * stride + t // kernel - padding, j * stride + t % kernel - padding
                        if 0 <= rr < height and 0 <= cc < width:
                            stack = torch.cat([m[:, channel, rr, cc] for m in (q, k, v)])
                            total = total + mix[t] @ stack
                    convolved.append(total)
                y[b, :, i, j] = alpha * torch.cat(attended) + beta * (torch.stack(convolved) + bias)
    return y
