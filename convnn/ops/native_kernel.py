"""The loops of ``native``, in the part of Python that numba compiles. Imported only where numba is installed.

Shapes: M candidates, K neighbours.
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


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _put(values, place, value):
    """Put a value into a falling list behind its equals; what stood at ``place``, its end, is lost. Return where."""
    while place > 0 and value > values[place - 1]:
        values[place] = values[place - 1]
        place -= 1
    values[place] = value
    return place


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _bound(row, tops, values):
    """Note the largest of each block of a row in ``tops``; return a number that at least K elements reach."""
    k = len(values)
    for block in range(len(tops)):
        tops[block] = top = _largest(row[block * LANES : block * LANES + LANES])
        if block < k:
            _put(values, block, top)
        elif top > values[k - 1]:
            _put(values, k - 1, top)
    return values[k - 1]


@numba.njit(nogil=True, error_model="numpy", cache=True)
def best_of_rows(score, found):
    """Write the columns of the K largest of each row of ``score`` (R, M) to ``found`` (R, K). None may be NaN.

    Of a row in blocks, the K-th largest of the blocks' largest is reached by at least K elements, so that only blocks
    that reach it need a look: about K of them.
    """
    rows, columns = score.shape
    k = found.shape[1]
    values, places = np.empty(k, score.dtype), np.empty(k, np.int64)
    tops = np.empty(columns // LANES, score.dtype)
    skips = len(tops) > k
    for r in range(rows):
        row = score[r]
        bound = _bound(row, tops, values) if skips else score.dtype.type(-np.inf)
        kept = 0
        for block in range(len(tops) + 1):
            if skips and block < len(tops):
                top = tops[block]
                if top < bound or (kept == k and top <= values[k - 1]):  # equals come too late
                    continue
            for column in range(block * LANES, min(block * LANES + LANES, columns)):
                value = row[column]
                if value < bound:
                    continue
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
        for slot in range(k):
            found[r, slot] = places[slot]


@numba.njit(nogil=True, error_model="numpy", cache=True, fastmath={"nnan", "nsz"})
def _range(row):
    """Return the least and the largest number of a row. None may be NaN."""
    least = most = row[0]
    for column in range(len(row)):
        least = min(least, row[column])
        most = max(most, row[column])
    return least, most


@numba.njit(nogil=True, error_model="numpy", cache=True)
def blend_rows(score, offset, share, floor, alike, low, high):
    """Turn similarities (R, M) into blends in place, as ``Scores`` does; note each row's range in ``low``, ``high``.

    ``offset`` (P, M) is what position takes off, for each P rows the same; ``floor`` (R,) and ``alike`` are those of
    ``similarity.span``. None may be NaN.
    """
    for r in range(len(score)):
        row, off = score[r], offset[r % len(offset)]
        least, most = _range(row)
        low[r], high[r] = least, most
        width = most - least
        if width <= max(alike * max(abs(least), abs(most)), floor[r]):
            for column in range(len(row)):
                row[column] = -off[column]
        else:
            for column in range(len(row)):
                row[column] = (row[column] - least) / width * share - off[column]
