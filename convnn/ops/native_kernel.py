"""The loops of ``native``, in the part of Python that numba compiles. Imported only where numba is installed.

Shapes: G items (batch times heads), P queries, M candidates, D channels, K neighbours.
"""

import numba
import numpy as np

LANES = 16
"""Candidates whose largest is found together."""


@numba.njit(nogil=True, error_model="numpy", cache=True, fastmath={"nnan", "nsz"})
def _largest(block):
    """Return the largest of ``LANES`` numbers: an instruction for several lanes, since none is NaN."""
    most = block[0]
    for lane in range(LANES):
        most = max(most, block[lane])
    return most


@numba.njit(nogil=True, error_model="numpy", cache=True, fastmath={"nnan", "nsz"})
def _sink(values, value):
    """Put a value into a falling list, whose last is lost; without branches, since none could be foreseen."""
    for place in range(len(values)):
        above = values[place]
        values[place] = max(above, value)
        value = min(above, value)


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _bound(row, tops, values):
    """Note the largest of each block of a row in ``tops``; return a number that at least K elements reach."""
    last = len(values) - 1
    values[:] = -np.inf
    for block in range(len(tops)):
        tops[block] = top = _largest(row[block * LANES : block * LANES + LANES])
        if top > values[last]:
            _sink(values, top)
    return values[last]


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _best(row, tops, values, reach, places):
    """Write the columns of the K largest of a row to ``places``, ties to the lower column. None may be NaN.

    Of a row in blocks, the K-th largest of the blocks' largest is reached by at least K elements, so that only blocks
    that reach it need a look: about K of them. ``tops`` has room for each whole block, ``values`` for K numbers,
    ``reach`` for a block.
    """
    k = len(values)
    bound = _bound(row, tops, values)  # -inf where there are fewer blocks than K
    kept = 0
    for block in range(len(tops) + 1):
        if block < len(tops):
            top = tops[block]
            if top < bound or (kept == k and top <= values[k - 1]):  # equals come too late
                continue
        count = 0
        for column in range(block * LANES, min(block * LANES + LANES, len(row))):
            reach[count] = column
            count += row[column] >= bound
        for column in reach[:count]:
            value = row[column]
            if kept < k:
                place = kept
                kept += 1
            elif value > values[k - 1]:
                place = k - 1
            else:
                continue
            while place > 0 and value > values[place - 1]:
                values[place] = values[place - 1]
                places[place] = places[place - 1]
                place -= 1
            values[place] = value
            places[place] = column


@numba.njit(nogil=True, error_model="numpy", cache=True)
def best_of_rows(score, found):
    """Write the columns of the K largest of each row of ``score`` (R, M) to ``found`` (R, K). None may be NaN."""
    (rows, columns), k = score.shape, found.shape[1]
    tops, values, reach = np.empty(columns // LANES, score.dtype), np.empty(k, score.dtype), np.empty(LANES, np.int64)
    for r in range(rows):
        _best(score[r], tops, values, reach, found[r])


@numba.njit(nogil=True, error_model="numpy", cache=True, fastmath={"nnan", "nsz"})
def _range(row):
    """Return the least and the largest number of a row. None may be NaN."""
    least = most = row[0]
    for column in range(len(row)):
        least = min(least, row[column])
        most = max(most, row[column])
    return least, most


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _blend(row, least, most, share, distance, floor, alike):
    """Turn similarities into blends in place, as ``Scores`` does: the same operations in the same order."""
    width, rest = most - least, row.dtype.type(1) - share
    if width <= max(alike * max(abs(least), abs(most)), floor):
        for column in range(len(row)):
            row[column] = -(rest * distance[column])
    else:
        scale = share / width
        for column in range(len(row)):
            row[column] = (row[column] - least) * scale - rest * distance[column]


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _blend_grid(row, least, most, share, rows, cols, floor, alike):
    """Do what ``_blend`` does for a grid, where the farther axis counts, behind prefix tokens infinitely far away."""
    width, rest = most - least, row.dtype.type(1) - share
    scale = row.dtype.type(0)
    if width > max(alike * max(abs(least), abs(most)), floor):
        scale = share / width
    prefix = len(row) - len(rows) * len(cols)
    row[:prefix] = -np.inf
    for i in range(len(rows)):
        line = row[prefix + i * len(cols) : prefix + (i + 1) * len(cols)]
        for j in range(len(cols)):
            line[j] = (line[j] - least) * scale - rest * max(rows[i], cols[j])


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _rank(row, p, g, terms, outcome, room):
    """Rank a row of similarities: note its range, blend it and leave the query's own column out, where asked for."""
    own, share, distance, rows, cols, floor, alike = terms
    low, high, found, first = outcome
    tops, values, reach = room
    if low.size:
        least, most = _range(row)
        low[g, p], high[g, p] = least, most
        if rows.size:
            _blend_grid(row, least, most, share[g], rows[p], cols[p], floor[g, p], alike)
        elif distance.size:
            _blend(row, least, most, share[g], distance[p], floor[g, p], alike)
    if own[p] >= 0:
        row[own[p]] = -np.inf
    _best(row, tops, values, reach, found[g, p, first:])


@numba.njit(nogil=True, error_model="numpy", cache=True)
def rank_scores(score, terms, outcome):
    """Rank similarities (G, P, M), which are lost: write the columns of the best and the ranges.

    Args:
        score: none may be NaN.
        terms: the column of each query that is left out, or -1, (P,); the blend, (G,); what position takes off: the
            share of the map, (P, M), or those along both axes, of which the larger counts, (P, rows) and (P, columns of
            the map), or empty arrays; ``floor`` (G, P) and ``alike`` of ``similarity.span``.
        outcome: ``low`` and ``high``, (G, P), or empty: no range; ``found`` (G, P, first + K); ``first``, how many
            of its slots are left alone.
    """
    items, queries, columns = score.shape
    room = _room(score, columns, outcome)
    for g in range(items):
        for p in range(queries):
            _rank(score[g, p], p, g, terms, outcome, room)


@numba.njit(nogil=True, error_model="numpy", cache=True)
def rank_products(q, keys, bias, terms, outcome):
    """Do what ``rank_scores`` does for the scores ``q @ keys + bias``, each row of which exists for a moment.

    Args:
        q: (G, P, D).
        keys: (G, D, M).
        bias: (G, M), or empty: none.
        terms: as in ``rank_scores``.
        outcome: likewise.
    """
    (items, queries, channels), columns = q.shape, keys.shape[2]
    room = _room(q, columns, outcome)
    row = np.empty(columns, q.dtype)
    for g in range(items):
        for p in range(queries):
            first, key = q[g, p, 0], keys[g, 0]
            for column in range(columns):
                row[column] = first * key[column]
            for channel in range(1, channels):
                factor, key = q[g, p, channel], keys[g, channel]
                for column in range(columns):
                    row[column] += factor * key[column]
            if bias.size:
                for column in range(columns):
                    row[column] += bias[g, column]
            _rank(row, p, g, terms, outcome, room)


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _room(like, columns, outcome):
    """Return what ranking a row needs for a while: numbers of blocks, numbers of the best, places in a block."""
    _, _, found, first = outcome
    k, dtype = found.shape[2] - first, like.dtype
    return np.empty(columns // LANES, dtype), np.empty(k, dtype), np.empty(LANES, np.int64)


@numba.njit(nogil=True, error_model="numpy", cache=True)
def add_rows(table, rows, values):
    """Add each row of ``values`` (R, C) to that of ``table`` (N, C) which ``rows`` (R,) names, one after another."""
    for r in range(len(rows)):
        own, value = table[rows[r]], values[r]
        for channel in range(len(value)):
            own[channel] += value[channel]
