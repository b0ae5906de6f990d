"""One reader of image files: depth, transparency, orientation; the same in memory, streamed and for pictures."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image, ImageOps

from convnn.config.schema import DataConfig
from convnn.data.datasets import load_dataset
from convnn.data.images import image_size, image_suffixes, in_threads, open_image
from convnn.data.stream import make_batches
from convnn.errors import ConfigError
from convnn.train.pictures import read_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def read(path):
    return np.asarray(open_image(os.fsencode(path)))


def grey(path):
    """Return the one channel of a grey image, checked to be grey."""
    pixels = read(path)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def tiff(path, values, bits, sample_format=1, photometric=1, order="<", data=None):
    """Write an uncompressed TIFF of one channel, also of kinds that Pillow does not write."""
    data = data or values.astype(np.dtype(values.dtype).newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    for tag, value in tags:
        head += struct.pack(order + "HHII", tag, 4, 1, start if tag == 273 else value)
    path.write_bytes(head + struct.pack(order + "I", 0) + data)


def png(path, width, depth, colour, rows, transparent):
    """Write a PNG of a depth and a transparent colour that Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b""))


# --------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "big.tiff", "x.pgm", "x.jp2"])
def test_16_bits_are_scaled_by_their_range(name, tmp_path):
    values = RAMP.astype(np.uint16) * 257
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values.astype(">u2" if name == "big.tiff" else "<u2")).save(tmp_path / name)
    assert np.array_equal(grey(tmp_path / name), RAMP)


@pytest.mark.parametrize(
    "values, kind",
    [
        (RAMP.astype(np.uint16) * 257, (16, 1, 1, ">")),
        (RAMP.astype(np.int16) * 128, (16, 2)),  # signed: white is 32767
        (RAMP.astype(np.int16) * 128, (16, 2, 1, ">")),
        (RAMP.astype(np.uint32) * 257, (32, 1)),  # 16 bits in wider files
        (RAMP.astype(np.int32) * 257, (32, 2)),
        (RAMP.astype(np.int32) * 257, (32, 2, 1, ">")),
        (RAMP.astype(np.uint32) * 0x01010101, (32, 1)),  # above 2**31 Pillow shows negative values
        (RAMP.astype(np.int32) * (2**31 // 255), (32, 2)),
        ((RAMP // 2).astype(np.int8), (8, 2)),
        ((RAMP / 255).astype(np.float32), (32, 3)),
        ((RAMP / 255).astype(np.float32), (32, 3, 1, ">")),
    ],
)
def test_other_depths_are_scaled_by_theirs(values, kind, tmp_path):
    tiff(tmp_path / "x.tiff", values, *kind)
    assert np.abs(grey(tmp_path / "x.tiff").astype(int) - RAMP).max() <= 1


def test_white_may_be_zero(tmp_path):
    tiff(tmp_path / "16.tiff", RAMP.astype(np.uint16) * 257, 16, photometric=0)
    tiff(tmp_path / "float.tiff", (RAMP / 255).astype(np.float32), 32, 3, photometric=0)
    tiff(tmp_path / "8.tiff", RAMP, 8, photometric=0)
    for name in ("16", "float", "8"):
        assert np.array_equal(grey(tmp_path / f"{name}.tiff"), 255 - RAMP), name


def test_12_bits(tmp_path):
    values = RAMP.astype(int).ravel() * 4095 // 255
    data = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(values[::2], values[1::2], strict=True)
    )
    tiff(tmp_path / "x.tiff", RAMP, 12, data=data)
    assert np.abs(grey(tmp_path / "x.tiff").astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize(
    "values, kind, message",
    [
        (np.full((4, 4), 1.5, np.float32), (32, 3), "values go from 1.5 to 1.5, not from 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), (32, 3), "values go from nan"),
        (np.full((4, 4), -0.5, np.float32), (32, 3), "values go from -0.5"),
        (np.full((4, 4), -3, np.int32), (32, 2), "values go from -3"),
        (np.full((4, 4), -3, np.int16), (16, 2), "values go from -3"),
        (np.full((4, 4), 70000, np.int32), (32, 2), "32-bit values go up to 70000, neither"),
    ],
)
def test_values_outside_the_range_are_refused(values, kind, message, tmp_path):
    tiff(tmp_path / "x.tiff", values, *kind)
    with pytest.raises(ConfigError, match=rf"data.root: .*x.tiff cannot be read .*{message}") as error:
        read(tmp_path / "x.tiff")
    assert "\n" not in str(error.value)


def test_astronomers_files_are_read_where_pillow_reads_them_rightly(tmp_path):
    def fits(bits, data):
        cards = ["SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", "NAXIS1  = 16", "NAXIS2  = 16", "END"]
        return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + data.ljust(2880, b"\0")

    (tmp_path / "8.fits").write_bytes(fits(8, RAMP.tobytes()))
    assert np.array_equal(grey(tmp_path / "8.fits"), RAMP[::-1])  # rows go upwards
    (tmp_path / "16.fits").write_bytes(fits(16, RAMP.astype(">i2").tobytes()))
    with pytest.raises(ConfigError, match=r"16.fits cannot be read .*byte order"):
        read(tmp_path / "16.fits")


# ----------------------------------------------------------------------------------------------- transparency


def test_transparent_pixels_are_white_whatever_colour_hides_below(tmp_path):
    rng = np.random.default_rng(0)
    hidden = rng.integers(0, 256, (6, 6, 4), dtype=np.uint8)
    hidden[..., 3] = 0
    hidden[3:] = 40, 80, 120, 255
    images = {"rgba.png": hidden, "rgba.webp": hidden, "rgba.tiff": hidden, "rgba.tga": hidden}
    images["la.png"] = hidden[..., [0, 3]]
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
        result = read(tmp_path / name)
        assert (result[:3] == 255).all(), name
        assert (result[3:] == (40 if name == "la.png" else [40, 80, 120])).all(), name


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 255, 51)).save(tmp_path / "x.png")
    assert np.abs(read(tmp_path / "x.png").astype(int) - [204, 224, 255]).max() <= 1


def test_transparent_colours_of_palettes_and_of_each_depth(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "one.png", transparency=1)
    palette.save(tmp_path / "one.gif", transparency=1)
    palette.save(tmp_path / "many.png", transparency=b"\xff\x00\xff")
    white = [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]
    for name in ("one.png", "one.gif", "many.png"):
        assert read(tmp_path / name).tolist() == white, name
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "l.png", transparency=9)
    assert grey(tmp_path / "l.png").tolist() == [[7, 255]]
    Image.fromarray(np.array([[[7, 8, 9], [1, 2, 3]]], np.uint8)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert read(tmp_path / "rgb.png").tolist() == [[[7, 8, 9], [255] * 3]]
    png(tmp_path / "1.png", 2, 1, 0, [b"\x40"], struct.pack(">H", 0))
    png(tmp_path / "4.png", 2, 4, 0, [b"\x13"], struct.pack(">H", 3))
    png(tmp_path / "16.png", 2, 16, 0, [struct.pack(">HH", 257 * 17, 257 * 51)], struct.pack(">H", 257 * 51))
    rows = [struct.pack(">HHHHHH", *[257 * 17] * 3, *[257 * 51] * 3)]
    png(tmp_path / "48.png", 2, 16, 2, rows, struct.pack(">HHH", *[257 * 51] * 3))
    assert grey(tmp_path / "1.png").tolist() == [[255, 255]]
    for name in ("4", "16", "48"):
        assert grey(tmp_path / f"{name}.png").tolist() == [[17, 255]], name


# ------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff", "lzw.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(name, orientation, tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :4] = 255
    exif = Image.Exif()
    exif[274] = orientation
    more = {"compression": "tiff_lzw"} if name == "lzw.tiff" else {"quality": 100}
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, **more)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((8, 16, 3) if orientation < 5 else (16, 8, 3))
    assert np.array_equal(read(tmp_path / name), expected)
    assert min(image_size(os.fsencode(tmp_path / name))) == 8


def test_damaged_metadata_are_no_reason_to_refuse_an_image(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert grey(tmp_path / "x.jpg").shape == (16, 16)
    Image.fromarray(RAMP).save(tmp_path / "x.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(grey(tmp_path / "x.png"), RAMP)


# -------------------------------------------------------------------------------------------- one for all


def awkward(folder):
    """Write an image of each awkward kind, 8x12 pixels and not square once upright."""
    exif = Image.Exif()
    exif[274] = 6
    ramp = np.linspace(0, 255, 96).reshape(12, 8).astype(np.uint8)
    colour = np.stack([ramp, ramp[::-1], ramp[:, ::-1], np.where(ramp > 90, 255, 0).astype(np.uint8)], -1)
    Image.fromarray(colour[..., :3].copy()).save(folder / "turned.png", exif=exif)
    Image.fromarray(colour).save(folder / "transparent.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "deep.tiff")
    Image.fromarray(colour[..., :3].copy()).convert("CMYK").save(folder / "print.tiff")
    Image.fromarray(colour[..., :3].copy()).quantize(16).save(folder / "palette.gif")


def test_memory_streams_and_pictures_show_the_same(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            awkward(tmp_path / split / name)
    config = DataConfig("imagefolder", "convnn.data.load_imagefolder", str(tmp_path), workers=0, stream="false")
    config.mean, config.std = [0.0], [1.0]
    memory = load_dataset(config).test
    config.stream = "true"
    stream = load_dataset(config).test
    batches = [torch.cat([x for x, _ in make_batches(split, 4, config, 8).epoch()]) for split in (memory, stream)]
    assert torch.equal(*batches) and len(batches[0]) == 10
    for i, path in enumerate(stream.paths):
        shown = read_image(tmp_path / os.fsdecode(path), 3, config, 8, square=True)
        assert torch.equal(shown.x[0], batches[0][i]), path
    config.crop_pct = 1.0  # timm's evaluation: the centre of the upright image
    (x, _) = next(make_batches(load_dataset(config).test, 10, config, 8).epoch())
    assert (x - batches[0]).abs().max() < 0.02


def test_a_picture_for_one_channel_is_the_grey_of_the_reader(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "x.png")
    shown = read_image(tmp_path / "x.png", 1, tiny().data, 16, square=True)
    assert torch.equal((shown.picture[0] * 255).round().byte(), torch.from_numpy(RAMP))
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"image=.*x\.png cannot be read as an image"):
        read_image(tmp_path / "x.png", 1, tiny().data, 16, square=True)


@pytest.mark.parametrize("suffix", ["png", "tiff", "gif", "webp", "jp2", "tga", "avif"])
def test_files_cut_short_and_turned_bytes_are_one_line(suffix, tmp_path):
    """Of damaged files Pillow raises whatever its readers stumble over, struct.error or IndexError too."""
    if f".{suffix}" not in image_suffixes():
        pytest.skip("this Pillow does not read it")
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for i in range(40):
        data = bytearray(whole[: len(whole) * (i + 1) // 40])
        for place in rng.integers(0, len(data), 3):
            data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            read(path)
        except ConfigError as error:
            assert "\n" not in str(error) and f"x.{suffix} cannot be read" in str(error)


@pytest.mark.parametrize("slow", [False, True])
def test_threads_keep_the_order_and_pass_errors_on(slow, monkeypatch):
    monkeypatch.setattr("convnn.data.images._QUICK", 0.0 if slow else 1.0)
    assert in_threads(lambda i: i * i, range(100)) == [i * i for i in range(100)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // (90 - i), range(100))
