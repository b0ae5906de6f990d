"""Figures of the neighbours that layers chose, drawn on the image.

Shapes: C channels, h, w rows and columns of the image in pixels; a token of a map covers a cell of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convnn.figures.style import COLOUR_MAP, RC_PARAMS, add_legend, add_title, evenly_spread, plain_text
from convnn.ops.geometry import Geometry
from convnn.ops.neighborhood import Neighborhood

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 6
"""Layers in one picture; of more, evenly spread ones are drawn."""

WINDOW_COLOUR, PADDING_COLOUR = "#D55E00", "#e6e6e6"
"""Okabe and Ito's vermilion for the convolution window; grey for padding."""

SMALLEST_MARK = 32
"""A mark is at least this part of the image's longer side, even where a token covers less."""

Pixel = tuple[int, int]
NeighborsByLayer = Mapping[str, Neighborhood]


def draw_neighbors(
    image: Tensor, found: NeighborsByLayer | Neighborhood, pixels: Sequence[Pixel] = (), *, item: int = 0, head: int = 0
) -> Figure:
    """Draw which neighbours some pixels choose: a row for each pixel, a column for each layer.

    Args:
        image: (C, h, w), the image that ``found`` belongs to; scaled to be seen.
        found: what ``convnn.neighbors_of`` returned, or one layer's answer.
        pixels: (row, column) of the queries in the image; default: see ``default_pixels``.
        item: number of the image in the batch.
        head: of layers that have several, from 0.

    Returns:
        A matplotlib figure; ``figure.savefig("neighbors.png")`` writes it.

    Raises:
        ValueError: if a query lies outside the image, or a layer that is drawn has no such head.
    """
    found = {"layer": found} if isinstance(found, Neighborhood) else found
    names = evenly_spread(list(found), MAX_COLUMNS)
    pixels = list(pixels) or default_pixels(image)
    rows = [(f"query {i + 1}\n({r}, {c})", (r, c), found) for i, (r, c) in enumerate(pixels)]
    _check_pixels(image, pixels)
    _check_head(found, names, head)
    title = f"Which {_count(found, 'token')} each layer mixes for one query"
    return _draw_panels(image, names, rows, item, head, title)


def draw_blends(
    image: Tensor, found: Mapping[float, NeighborsByLayer], pixel: Pixel, *, item: int = 0, head: int = 0
) -> Figure:
    """Draw what one pixel chooses along the blend axis: a row for each blend, a column for each layer."""
    _check_pixels(image, [pixel])
    first = next(iter(found.values()))
    names = evenly_spread(list(first), MAX_COLUMNS)
    _check_head(first, names, head)
    ends = {0.0: "\n(convolution)", 1.0: "\n(attention)"}
    rows = [(f"blend {blend:g}{ends.get(blend, '')}", pixel, layers) for blend, layers in found.items()]
    title = f"The same query from convolution to attention: its {_count(first, 'neighbour')} at each blend"
    return _draw_panels(image, names, rows, item, head, title)


def draw_weights(
    image: Tensor, found: NeighborsByLayer, pixels: Sequence[Pixel] = (), *, item: int = 0
) -> Figure | None:
    """Draw what share of a query's weights each token gets, averaged over heads; None without weights."""
    weighted = {name: one for name, one in found.items() if one.weights is not None}
    if not weighted:
        return None
    pixels = list(pixels) or default_pixels(image)
    _check_pixels(image, pixels)
    rows = [(f"query {i + 1}\n({r}, {c})", (r, c), weighted) for i, (r, c) in enumerate(pixels)]
    heads = max(one.index.shape[1] for one in weighted.values())
    title = "How much each token weighs for one query" + (f" (mean of {heads} heads)" if heads > 1 else "")
    return _draw_panels(image, evenly_spread(list(weighted), MAX_COLUMNS), rows, item, None, title)


def default_pixels(image: Tensor) -> list[Pixel]:
    """Return three pixels of an image (C, h, w): near the centre, in the upper left quarter, in the lower right."""
    h, w = image.shape[-2:]
    return [(h // 2, w // 2), (h // 4, w // 4), (h - 1 - h // 16, w - 1 - w // 16)]


def _check_pixels(image: Tensor, pixels: Sequence[Pixel]) -> None:
    h, w = image.shape[-2:]
    for row, col in pixels:
        if not (0 <= row < h and 0 <= col < w):
            raise ValueError(f"query ({row}, {col}) lies outside the image of {h} rows and {w} columns")


def _check_head(found: NeighborsByLayer, names: Sequence[str], head: int) -> None:
    heads = {name: found[name].index.shape[1] for name in names}
    several = {name: count for name, count in heads.items() if count > 1}  # a convolution has one, whatever is asked
    if head and not several:
        raise ValueError(f"head={head}: no layer that is drawn has several heads; leave it at 0")
    for name, count in several.items():
        if not 0 <= head < count:
            raise ValueError(f"head={head}: layer {_short_name(name)} has heads 0 to {count - 1}; choose one of them")


def _count(found: NeighborsByLayer, word: str) -> str:
    counts = sorted({one.index.shape[-1] for one in found.values()})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{span} {word}" if counts == [1] else f"{span} {word}s"


def query_at(found: Neighborhood, pixel: Pixel, size: tuple[int, int]) -> int:
    """Return the number of the query whose token is nearest to a pixel of an image of ``size`` (h, w)."""
    g, prefix = found.geometry, found.geometry.prefix
    rows, cols = g.coordinates(found.queries[prefix:])
    distance = torch.zeros(len(rows), device=rows.device)
    for place, at, pad, side, whole in zip((rows, cols), pixel, g.padding, (g.height, g.width), size, strict=True):
        distance += ((place - pad + 0.5) / side - (at + 0.5) / whole).square()
    return prefix + int(distance.argmin())


def _draw_panels(
    image: Tensor,
    names: Sequence[str],
    rows: Sequence[tuple[str, Pixel, NeighborsByLayer]],
    item: int,
    head: int | None,
    title: str,
) -> Figure:
    """Draw a grid of panels: the image with the query at the left, then one panel for each layer.

    Args:
        image: (C, h, w).
        names: of the layers, the columns.
        rows: (label, query pixel, neighbours by layer). Where all have the same query, the first shows it alone.
        item: number of the image in the batch.
        head: of attention layers; None: colour tokens by weight, not by rank.
        title: of the figure.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    photo = _to_pixels(image)
    h, w = photo.shape[:2]
    grey = 0.45 + 0.45 * photo.mean(-1, keepdims=True).repeat(3, axis=-1)
    panel = min(1.9, 10.7 / (len(names) + 1))
    height = panel * max(0.6, min(h / w, 1.6)) + 0.4
    together = len({at for _, at, _ in rows}) == 1  # one query in all rows, shown once
    top = max(one.index.shape[-1] for _, _, layers in rows for one in layers.values())
    shades = _shades(names, rows, item, (h, w), None if head is None else max(top, 2))
    titley = {"axes.titley": 1.0}  # where it would be anyway, without a search for ticks that it might cover
    with mpl.rc_context(RC_PARAMS | {"axes.grid": False, "font.size": 12} | titley):
        figure = Figure(figsize=(panel * (len(names) + 1) + 2.6, height * len(rows) + 1.3))
        panels = figure.subplots(len(rows), len(names) + 1, squeeze=False)
        for i, ((label, at, layers), line) in enumerate(zip(rows, panels, strict=True)):
            if together and i:
                line[0].axis("off")
            else:
                _draw_image(line[0], photo)
                line[0].plot(at[1] + 0.5, at[0] + 0.5, "o", ms=9, mfc="black", mec="white", mew=2, clip_on=False)
            _note(line[int(together)], label, (0, 0.5), (-8, 0), ha="right", va="center")
            for name, axes in zip(names, line[1:], strict=True):
                _draw_panel(axes, grey, layers[name], item, head, at, shades)
        panels[0, 0].set_title("input", fontsize=12)
        for name, axes in zip(names, panels[0, 1:], strict=True):
            g = rows[0][2][name].geometry
            shown = plain_text(_short_name(name).replace(".", ". "), int(panel * 9.5), 5).replace(". ", ".")
            axes.set_title(f"{shown}\n{g.height}×{g.width} tokens", fontsize=12)
        bar = figure.colorbar(shades, ax=panels.ravel().tolist(), shrink=0.8, pad=0.02, aspect=28)
        if head is None:
            bar.set_label("share of the query's weight")
        else:
            bar.set_ticks(sorted({1, *range(5, top, 5)} | {top}) if top <= 30 else [1, top // 2, top])
            bar.set_label("rank (1: chosen first)")
            bar.ax.invert_yaxis()
        add_legend(figure, {entry.get_label(): entry for entry in _legend([rows[0][2][name] for name in names])})
        if head is not None and any(rows[0][2][name].index.shape[1] > 1 for name in names):
            title += f" (head {head})"
        add_title(figure, title)
    return figure


def _shades(
    names: Sequence[str],
    rows: Sequence[tuple[str, Pixel, NeighborsByLayer]],
    item: int,
    size: Pixel,
    ranks: int | None,
) -> Any:
    """Return the colours of tokens: by rank up to ``ranks``, or by their share of a query's weight if that is None."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if ranks is not None:
        return ScalarMappable(Normalize(1, ranks), f"{COLOUR_MAP}_r")
    shares = (_token_weights(layers[name], item, query_at(layers[name], at, size))
              for _, at, layers in rows for name in names)  # fmt: skip
    return ScalarMappable(Normalize(0, max(float(share.max()) for share in shares)), COLOUR_MAP)


def _to_pixels(image: Tensor) -> Any:
    """Return an image (C, h, w) as an array (h, w, 3) from 0 to 1."""
    x = image.detach().cpu().float()
    if x.amin() < 0 or x.amax() > 1:
        x = (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-9)
    x = x.expand(3, -1, -1) if len(x) == 1 else x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)
    return x.permute(1, 2, 0).numpy()


def _short_name(name: str) -> str:
    return name.removesuffix(".neighbors").removesuffix(".attn")


def _draw_image(axes: Axes, picture: Any) -> None:
    h, w = picture.shape[:2]
    axes.imshow(picture, extent=(0, w, h, 0), interpolation="nearest", zorder=1)
    axes.set_axis_off()  # axes without ticks and lines would still be measured, which takes longer than the picture


def _note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Write beside a panel: at a place as shares of its sides, moved by points."""
    axes.annotate(text, place, offset, xycoords="axes fraction", textcoords="offset points", **look)


def _token_weights(found: Neighborhood, item: int, query: int) -> Tensor:
    """Return the share of a query's weights that each token gets, mean over heads: (N,)."""
    assert found.weights is not None
    index, weights = found.index[item, :, query].flatten().cpu(), found.weights[item, :, query].flatten().float().cpu()
    shares = torch.zeros(found.geometry.num_tokens).scatter_add_(0, index, weights)
    return shares / found.index.shape[1]


def _cell(g: Geometry, token: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, width and height of a token's cell in image pixels; prefix tokens stand above the image."""
    dy, dx = size[0] / g.height, size[1] / g.width
    if token < g.prefix:
        side = max(size) / 9
        return token * side * 1.2, -g.padding[0] * dy - 1.35 * side, side, side
    row, col = divmod(token - g.prefix, g.padded_shape[1])
    return (col - g.padding[1]) * dx, (row - g.padding[0]) * dy, dx, dy


def _draw_panel(
    axes: Axes, photo: Any, found: Neighborhood, item: int, head: int | None, at: Pixel, shades: Any
) -> None:
    from matplotlib.patches import Rectangle

    size, g = photo.shape[:2], found.geometry
    query = query_at(found, at, size)
    dy, dx = size[0] / g.height, size[1] / g.width
    (left_pad, right_pad, top_pad, bottom_pad), own = g.pads, _cell(g, int(found.queries[query]), size)
    _draw_image(axes, photo)
    corner = (-left_pad * dx, -top_pad * dy)
    whole = (size[1] + (left_pad + right_pad) * dx, size[0] + (top_pad + bottom_pad) * dy)
    axes.add_patch(Rectangle(corner, *whole, fc=PADDING_COLOUR, ec="none", zorder=0))
    for token in range(g.prefix):
        left, top, *sides = _cell(g, token, size)
        axes.add_patch(Rectangle((left, top), *sides, fc="white", ec="#444444", lw=1.2, clip_on=False))
    if g.prefix:
        left, top, *sides = _cell(g, g.prefix - 1, size)
        axes.text(left + 1.2 * sides[0], top + sides[1] / 2, "CLS", va="center", fontsize=10)
    if head is None:
        marks = [(t, s) for t, s in enumerate(_token_weights(found, item, query).tolist()) if s > 0]
        note = None
    else:
        head = head if found.index.shape[1] > 1 else 0
        valid = found.valid[item, head, query].tolist()
        ranked = found.index[item, head, query].tolist()
        marks = [(t, r + 1.0) for r, (t, ok) in enumerate(zip(ranked, valid, strict=True)) if ok][::-1]
        inside = int(found.in_window()[item, head, query].sum())
        note = f"{inside} of {len(marks)} in window"
    least = max(size) / SMALLEST_MARK  # a smaller cell would not be seen
    fine = min(dx, dy) < least
    for token, value in marks:
        left, top, *sides = _cell(g, token, size)
        wide, high = (max(side, least) for side in sides)
        place = (left - (wide - sides[0]) / 2, top - (high - sides[1]) / 2)
        edge = 0.3 if fine else 0.6
        axes.add_patch(Rectangle(place, wide, high, fc=shades.to_rgba(value), ec="white", lw=edge, zorder=3))
    before, after = (
        [taps * d + 0.5 for taps, d in zip(side, g.dilation, strict=True)]
        for side in ([(m - 1) // 2 for m in found.window], [m // 2 for m in found.window])
    )
    centre = (own[0] + dx / 2, own[1] + dy / 2)
    ends = []
    for axis, step in enumerate((dx, dy)):  # cut where the map ends
        low, high = centre[axis] - before[1 - axis] * step, centre[axis] + after[1 - axis] * step
        ends.append((max(low, corner[axis]), min(high, corner[axis] + whole[axis])))
    box = ((ends[0][0], ends[1][0]), ends[0][1] - ends[0][0], ends[1][1] - ends[1][0])
    for width, colour in ((2.6, "white"), (1.4, WINDOW_COLOUR)) if fine else ((4.2, "white"), (2.2, WINDOW_COLOUR)):
        axes.add_patch(Rectangle(*box, fill=False, ec=colour, lw=width, zorder=4, clip_on=False))
    dot: Any = {"ms": 2.5, "mew": 0.6} if fine else {"ms": 5.5, "mew": 1.2}
    axes.plot(*centre, "o", mfc="black", mec="white", zorder=5, clip_on=False, **dot)
    above = 1.5 * max(size) / 9 if g.prefix else 0
    axes.set_xlim(corner[0], corner[0] + whole[0])
    axes.set_ylim(corner[1] + whole[1], corner[1] - above)
    if note:
        _note(axes, note, (0.5, 0), (0, -3), ha="center", va="top", fontsize=11)


def _legend(found: Sequence[Neighborhood]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    windows = sorted({one.window for one in found})
    size = f"{windows[0][0]}×{windows[0][1]} " if len(windows) == 1 else ""
    entries: list[Any] = [
        Line2D([], [], ls="", marker="o", ms=8, mfc="black", mec="white", label="query"),
        Patch(fc="none", ec=WINDOW_COLOUR, lw=2.2, label=f"{size}window of a convolution"),
    ]
    if any(one.geometry.has_ring for one in found):
        entries.append(Patch(fc=PADDING_COLOUR, ec="#999999", label="zero padding"))
    if any(one.geometry.prefix for one in found):
        entries.append(Patch(fc="white", ec="#444444", label="class token (CLS)"))
    return entries
