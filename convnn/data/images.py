"""One reader for every image file: whatever its format, an upright RGB image of 8 bits."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from convnn.errors import ConfigError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
BACKGROUND = "white"
"""What shows through transparent pixels."""

READ = "data.root: "
"""How messages about files begin."""

_NOT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Formats that Pillow knows by name only, or draws with another program."""

_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""By EXIF orientation, the transposition that sets an image upright."""

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _ORIENTATION = 258, 262, 339, 274
"""Tags of TIFF, the last of EXIF too."""

_CHUNK = 32
"""Files per task of a thread."""

_QUICK = 3e-4
"""Seconds: files that are read faster, such as small images, cost more in threads, which wait for each other."""


@cache
def _formats() -> list[str]:
    """Return Pillow's formats in the order in which a file is tried: the usual ones first, which saves time."""
    from PIL import Image

    Image.init()
    return sorted(set(Image.ID) - _NOT_PIXELS, key=lambda name: (name not in ("JPEG", "PNG", "WEBP"), name))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters and with their dot, of the files that count as images."""
    from PIL import Image

    formats = {*_formats(), "MPO"}  # which the reader of JPEG opens
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def in_threads(call: Callable[[Any], T], items: Sequence[Any] | np.ndarray) -> list[T]:
    """Return ``[call(item) for item in items]``, computed in threads from where calls take long enough for it."""
    chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    values: list[T] = []
    for i, chunk in enumerate(chunks):
        times = [time.perf_counter()]
        for item in chunk:
            values.append(call(item))
            times.append(time.perf_counter())
        if np.median(np.diff(times)) > _QUICK:
            with ThreadPoolExecutor() as pool:
                rest = pool.map(lambda chunk: [call(item) for item in chunk], chunks[i + 1 :])
                return values + [value for part in rest for value in part]
    return values


@contextmanager
def _opened(path: bytes, prefix: str) -> Iterator[Image]:
    from PIL import Image

    name = os.fsdecode(path)
    try:
        with Image.open(name, formats=_formats()) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file Pillow raises whatever its reader stumbles over
        raise ConfigError(
            f"{prefix}{name} cannot be read as an image ({first_line(error)}); remove or replace it"
        ) from error


@contextmanager
def reading(prefix: str) -> Iterator[None]:
    """Begin messages about files that cannot be read with what the user calls their place."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(f"^{READ}", lambda _: prefix, str(error))) from error


def open_image(path: bytes, prefix: str = READ) -> Image:
    """Read a file as an upright RGB image of 8 bits, its first frame if it has several.

    EXIF orientation is applied. Deeper grey values are scaled by the range of their format (see ``_deep_grey``).
    Transparent pixels show ``BACKGROUND``. Colour profiles are not applied.

    Args:
        path: of the file, as ``os.fsencode`` has it.
        prefix: of the error's message, which goes on with the file's name.

    Raises:
        ConfigError: naming the file, if it cannot be read.
    """
    with _opened(path, prefix) as image:
        _scale_transparency(image)
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(_transposition(turn))


def open_square(path: bytes, side: int) -> Image:
    """Read a file as an RGB square of ``side`` pixels: scaled and cropped at the centre where it is none."""
    from PIL import Image, ImageOps

    image = open_image(path)
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def image_size(path: bytes) -> tuple[int, int]:
    """Return width and height in pixels from a file's header, as stored: the orientation is not looked at.

    Raises:
        ConfigError: naming the file, if it cannot be read.
    """
    with _opened(path, READ) as image:
        return image.size


def _transposition(name: str) -> Any:
    from PIL import Image

    return Image.Transpose[name]


def _orientation(image: Image) -> int:
    """Return the EXIF orientation of a loaded image, 1 where there is none. Pillow has turned TIFF on loading."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata are no reason to refuse the pixels
        return 1


def _scale_transparency(image: Image) -> None:
    """Bring PNG's transparent colour, which Pillow leaves in the file's depth, to the depth of the pixels."""
    value, tile = image.info.get("transparency"), getattr(image, "tile", None)
    if value is None or image.format != "PNG" or not tile:
        return
    raw = tile[0][3]
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(v >> 8 for v in value)


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    signed_bytes = image.mode == "L" and _tag(image, _SAMPLE_FORMAT, 1) == 2
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or signed_bytes:
        image = _deep_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _tag(image: Image, tag: int, default: int) -> int:
    """Return the (first) value of a TIFF tag; the default for other formats."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _deep_grey(image: Image) -> Image:
    """Scale one channel of integers or floats to 8 bits: black is 0, white the largest value of the format.

    That is 65535 for 16 bits (4095 for 12, half of it where values are signed). Pillow reads 16 bits as 32 from some
    formats, and 32-bit files mostly hold 16-bit values: of 32 bits white is 65535 if no value exceeds it, else the
    largest integer. Of floats it is 1.

    Raises:
        ValueError: if a value is outside, or 32 bits are neither.
    """
    from PIL import Image

    if image.format == "FITS":
        raise ValueError("FITS of more than 8 bits, whose byte order Pillow ignores")
    values = np.asarray(image)
    bits, signed = _tag(image, _BITS, 0), _tag(image, _SAMPLE_FORMAT, 2) == 2
    top: float = 1
    if image.mode == "L":
        values, top = values.view(np.int8), 127
    elif image.mode.startswith("I;16"):
        top = 2 ** (bits or 16) - 1
    elif image.mode == "I" and bits == 16:
        top = 2**15 - 1
    elif image.mode == "I":
        values = values if signed else values.view(np.uint32)
        top = 2**16 - 1 if values.max() < 2**16 else 2 ** (32 - signed) - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # NaN is neither
        raise ValueError(f"its values go from {low:g} to {high:g}, not from 0 to {top:g}; scale them, or save 16 bits")
    if top > 2**16 and 255 * int(high) < top:
        raise ValueError(f"its 32-bit values go up to {high}, neither 16 bits nor visible in 32; save 16 bits")
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC, 1) == 0:  # white is zero: Pillow inverts 8 bits only
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    return Image.fromarray(grey)
