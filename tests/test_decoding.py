"""Images as every viewer shows them."""

import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from supsup_lightning import ContinualDataModule
from supsup_lightning.data import ImageFolder, Whole, decoding
from supsup_lightning.data.workers import ImageFiles
from supsup_lightning.errors import DataError

WHITE = [255, 255, 255]
PALETTE = [[9, 8, 7], [40, 50, 60], [70, 80, 90]]


@pytest.fixture(autouse=True)
def unsaid():
    """What is said once per process may be said again in each test."""
    decoding._warned.clear()


def png(bits: int, colour: int, pixels: bytes, *, width: int, **chunks: bytes) -> bytes:
    """One line of a PNG, of depths and transparencies that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    others = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")


def colours(path) -> list[list[int]]:
    """The pixels of a line; grey ones are checked to be the same read in one channel."""
    image = decoding.read_image(path, channels=3)
    grey = np.asarray(decoding.read_image(path, channels=1))
    np.testing.assert_array_equal(grey, np.asarray(image.convert("L")))
    return np.asarray(image).reshape(-1, 3).tolist()


def greys(*levels: int) -> list[list[int]]:
    return [[level] * 3 for level in levels]


def test_sixteen_bits_are_the_picture_of_eight(tmp_path):
    draw = np.random.default_rng(0)
    stores = {}
    for k in range(4):
        for depth in (8, 16):
            (tmp_path / f"depth{depth}" / f"c{k}").mkdir(parents=True)
        for i in range(10):
            x = np.clip(6000 + 15000 * k + draw.normal(0, 3000, (8, 8)), 0, 65535).astype("uint16")
            Image.fromarray(x).save(tmp_path / "depth16" / f"c{k}" / f"{i}.png")
            Image.fromarray((x >> 8).astype("uint8")).save(tmp_path / "depth8" / f"c{k}" / f"{i}.png")
    for depth in (8, 16):
        folder = tmp_path / f"depth{depth}"
        data = ContinualDataModule(Whole(ImageFolder()), root=folder, input_shape=(1, 8, 8), num_workers=0)
        data.setup()
        stores[depth] = data.stream.train
    assert torch.equal(stores[8].store.pixels, stores[16].store.pixels)
    assert len(stores[16].store.pixels.unique()) > 200
    assert stores[16].std.item() > 50


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("png", "u2"), ("tif", "<u2"), ("tif", ">u2"), ("tif", "int32"), ("pgm", "u2"), ("pgm", "int32")],
)
def test_grey_of_more_than_eight_bits(suffix, kind, tmp_path):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.array([[0, 300, 511, 512, 65535]]).astype(kind)).save(path)
    assert colours(path) == greys(0, 1, 1, 2, 255)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (png(1, 0, b"\x50", width=4), greys(0, 255, 0, 255)),
        (png(2, 0, b"\x1b", width=4), greys(0, 85, 170, 255)),
        (png(4, 0, b"\x0f\x5f", width=4), greys(0, 255, 85, 255)),
        (png(4, 0, b"\x0f\x5f", width=4, tRNS=b"\0\5"), greys(0, 255, 255, 255)),
        (png(2, 0, b"\x1b", width=4, tRNS=b"\0\0"), greys(255, 85, 170, 255)),
        (png(16, 0, struct.pack(">3H", 0, 300, 301), width=3, tRNS=struct.pack(">H", 300)), greys(0, 255, 1)),
        (png(16, 2, struct.pack(">6H", 0, 300, 65535, 256, 511, 512), width=2), [[0, 1, 255], [1, 1, 2]]),
        (png(16, 4, struct.pack(">4H", 300, 65535, 300, 0), width=2), greys(1, 255)),
        (png(16, 6, struct.pack(">8H", *[512, 768, 1024, 65535], *[0, 0, 0, 0]), width=2), [[2, 3, 4], WHITE]),
        (png(16, 2, struct.pack(">6H", 512, 512, 512, 0, 0, 0), width=2, tRNS=b"\2\0" * 3), greys(255, 0)),
        (png(8, 2, bytes([1, 2, 3, 4, 5, 6]), width=2, tRNS=struct.pack(">3H", 1, 2, 3)), [WHITE, [4, 5, 6]]),
        (png(2, 3, b"\x18", width=3, PLTE=bytes(np.ravel(PALETTE).tolist())), PALETTE),
        (
            png(2, 3, b"\x18", width=3, PLTE=bytes(np.ravel(PALETTE).tolist()), tRNS=b"\0\xff"),
            [WHITE, *PALETTE[1:]],
        ),
        (b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023), greys(0, 128, 255)),
    ],
)  # fmt: skip
def test_depth_and_transparency(content, shown, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert colours(path) == shown


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_white_and_opaque_ones_themselves(name, mode, tmp_path):
    image = Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 128]]], dtype=np.uint8))
    image = image.convert(mode)
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    grey = image.convert("L").getpixel((1, 0))
    assert colours(tmp_path / name) == [WHITE, [10, 20, 30] if mode == "RGBA" else [grey] * 3, [127] * 3]


def test_white_is_zero_where_a_tiff_says_so(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(path, tiffinfo={262: 0})
    assert colours(path) == greys(255, 0)


def test_other_spaces_of_colour(tmp_path):
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    Image.new("LAB", (1, 1), (117, 187, 176)).save(tmp_path / "lab.tif")
    Image.new("YCbCr", (1, 1), (76, 85, 255)).save(tmp_path / "video.tif")
    for name, expected in (("print.jpg", [255, 0, 0]), ("lab.tif", [200, 48, 31]), ("video.tif", [254, 0, 0])):
        np.testing.assert_allclose(np.asarray(decoding.read_image(tmp_path / name, channels=3))[0, 0], expected, atol=2)


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp", "photo.tif", "packed.tif"])
def test_every_orientation_is_turned(name, tmp_path):
    levels = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8))
    options = {
        "photo.jpg": {"quality": 100},
        "photo.webp": {"lossless": True},
        "packed.tif": {"compression": "tiff_lzw"},
    }
    turned = {
        1: levels,
        2: levels[:, ::-1],
        3: levels[::-1, ::-1],
        4: levels[::-1],
        5: levels.T,
        6: np.rot90(levels, -1),
        7: levels[::-1, ::-1].T,
        8: np.rot90(levels),
    }
    for orientation, expected in turned.items():
        image = Image.fromarray(levels)
        tags = image.getexif()
        tags[0x0112] = orientation
        image.save(tmp_path / name, exif=tags, **options.get(name, {}))
        shown = np.asarray(decoding.read_image(tmp_path / name, channels=1)).astype(int)
        np.testing.assert_allclose(shown, expected, atol=8, err_msg=f"orientation {orientation}")


def test_a_photograph_lies_as_viewers_show_it(tmp_path):
    image = Image.fromarray(np.repeat(np.array([255, 0], np.uint8), 8)[:, None].repeat(16, 1)).convert("RGB")
    tags = image.getexif()
    tags[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=tags, quality=95)
    pixels = ImageFiles([tmp_path / "photo.jpg"], (3, 16, 16)).fetch(0).float()
    assert pixels[:, :, :8].mean() < 5
    assert pixels[:, :, 8:].mean() > 250


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, 1.0]], "float32"), "floating-point pixels, so that its range"),
        (np.array([[0, 70000]], "int32"), "pixels from 0 to 70000, so that its range"),
        (np.array([[-1, 300]], "int32"), "pixels from -1 to 300"),
        (np.array([[0, 200]], "int32"), "pixels from 0 to 200"),
    ],
)
def test_numbers_without_a_range_are_refused(values, message, tmp_path):
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(DataError, match=rf"image.tif has .*{message}.*data.on_error=skip"):
        decoding.read_image(tmp_path / "image.tif", channels=1)


def test_only_image_formats_are_opened_and_within_a_limit(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append(1))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    jpeg = tmp_path / "whole.jpg"
    Image.new("RGB", (64, 64)).save(jpeg)
    for name, content in (("eps.png", eps), ("empty.png", b""), ("cut.jpg", jpeg.read_bytes()[:-200])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            decoding.read_image(tmp_path / name, channels=3)
    assert not started
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    decoding.read_image(jpeg, channels=3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match="64 x 64 pixels are more than PIL.Image.MAX_IMAGE_PIXELS=4095"),
    ):
        decoding.read_image(jpeg, channels=3)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tif", "a.webp"])
def test_the_first_of_several_frames_is_taken_and_it_is_said_once(name, tmp_path, caplog):
    frames = [Image.new("L", (4, 4), level) for level in (40, 80, 120)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    for _ in range(2):
        assert colours(tmp_path / name)[0] == [40] * 3
    assert len(caplog.records) == 1
    assert f"{name} has several frames or pages" in caplog.text


def test_a_black_picture_of_sixteen_bits_is_pointed_out(tmp_path, caplog):
    Image.fromarray(np.array([[0, 200]], dtype=np.uint16)).save(tmp_path / "dark.png")
    with caplog.at_level(logging.WARNING):
        assert colours(tmp_path / "dark.png") == greys(0, 0)
    assert "dark.png has 16 bits, but no pixel above 255" in caplog.text
