"""Decoding of image files as viewers show them: depth, orientation, transparency and palette, 8 bits per channel."""

import logging
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from supsup_lightning.errors import DataError

logger = logging.getLogger(__name__)

# Pillow opens other formats as well, by content and not by name: an EPS would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "PCX", "QOI", "SGI", "TGA")

_BACKGROUND = "white"  # what a browser and a page of print show through transparent pixels

# How to turn the stored image for each EXIF orientation. `ImageOps.exif_transpose` does the same, but it rewrites all
# EXIF data and fails if some are damaged.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0

_warned: set[str] = set()


class _UnknownRange(Exception):
    """Pixels whose range from black to white is not known."""


def read_image(path: Path, *, channels: int) -> Image.Image:
    """Return the image as viewers show it, in mode ``RGB``, or ``L`` if ``channels`` is 1.

    The upper 8 of 16 bits are kept. The EXIF orientation is applied. Transparent pixels become white. The first of
    several frames or pages is taken, with one warning. Colour profiles are not applied.

    Raises:
        DataError: no image, or a damaged one; one with more pixels than `PIL.Image.MAX_IMAGE_PIXELS`; or one of floats
            or 32-bit integers, whose range is not known.
    """
    try:
        # From a stream: Pillow 13 maps a TIFF opened by name into memory, and reads a rotated one with wrong lines.
        with Path(path).open("rb") as stream, Image.open(stream, formats=_FORMATS) as file:
            return _shown(file, path, channels=channels)
    except _UnknownRange as error:
        raise DataError(
            f"The image {path} has {error}, so that its range from black to white is not known. Save it with 8 or 16 "
            "bits, or leave such images out with data.on_error=skip."
        ) from None
    except UnidentifiedImageError as error:
        raise DataError(
            f"The image {path} cannot be read: it is damaged, or of none of the formats {', '.join(_FORMATS)}. Fix or "
            "remove it, or leave such images out with data.on_error=skip."
        ) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others
        raise DataError(
            f"The image {path} cannot be read ({type(error).__name__}: {error}). Fix or remove it, or leave such "
            "images out with data.on_error=skip."
        ) from error


def picture_of(image: Image.Image, *, channels: int, name: str) -> Image.Image:
    """Return an open image as viewers show it, as `read_image` does with a file.

    Raises:
        DataError: as `read_image`; ``name`` begins the message.
    """
    try:
        return _shown(image, name, channels=channels)
    except Exception as error:  # as in `read_image`
        raise DataError(f"{name} cannot be read ({type(error).__name__}: {error}).") from error


def _shown(image: Image.Image, path: Path | str, *, channels: int) -> Image.Image:
    _check_size(image)
    if image.format != "MPO" and getattr(image, "is_animated", False):  # the second image of an MPO is hidden
        _warn_once("several frames or pages, of which the first is taken", path)
    tiles = getattr(image, "tile", None)  # Pillow drops them once the pixels are loaded
    depth = tiles[0].args if tiles else None
    image.load()
    shown = _opaque(_eight_bits(image, path, depth))
    turn = _TURNS.get(_orientation(image, path))
    shown = _converted(shown, "L" if channels == 1 else "RGB")
    return shown if turn is None else shown.transpose(turn)


def _check_size(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS  # above it Pillow only warns; above twice as many it raises
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS={limit}"
        )


def _warn_once(what: str, path: Path | str) -> None:
    """Log a warning about the first such image in this process."""
    if what not in _warned:
        _warned.add(what)
        logger.warning("%s has %s; others may as well.", path, what)


def _orientation(image: Image.Image, path: Path | str) -> int:
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation)
        return tag if isinstance(tag, int) else 1
    except Exception as error:  # damaged EXIF data raise many kinds; viewers then show the image as stored
        _warn_once(f"EXIF data that cannot be read ({error}), and is taken as it is stored", path)
        return 1


def _eight_bits(image: Image.Image, path: Path | str, depth: object) -> Image.Image:
    """Return greyscale of more than 8 bits in 8 bits, with its transparency if any; other images unchanged."""
    transparent = image.info.get("transparency")
    if image.mode == "F":
        raise _UnknownRange("floating-point pixels")
    if image.mode == "I" and image.format != "PPM":  # Pillow scales PPM to 16 bits
        lowest, highest = (int(extreme) for extreme in image.getextrema())  # type: ignore[arg-type]
        # A maximum of at most 255 suggests 8 bits stored in wide integers; read as 16 bits, it would be black.
        if lowest < 0 or highest > 65535 or 0 < highest < 256:
            raise _UnknownRange(f"32-bit or signed pixels from {lowest} to {highest}")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if 0 < values.max() < 256:
            _warn_once("16 bits, but no pixel above 255: it is black, as viewers show it", path)
        grey = (values >> (4 if _tiff_tag(image, _TIFF_BITS) == (12,) else 8)).astype(np.uint8)
        if _tiff_tag(image, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        if transparent is None:
            return Image.fromarray(grey)
        return Image.fromarray(np.stack([grey, np.where(values == transparent, 0, 255).astype(np.uint8)], -1))
    if transparent is not None and depth in ("L;2", "L;4"):  # Pillow scales the pixels of a PNG, but not this value
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[str(depth)]
    if transparent is not None and depth == "RGB;16B":  # the same for 16 bits: keep the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def _tiff_tag(image: Image.Image, tag: int) -> object:
    return getattr(image, "tag_v2", {}).get(tag)


def _opaque(image: Image.Image) -> Image.Image:
    """Return the image over the background, if any of its pixels may be transparent."""
    if not image.has_transparency_data:
        return image
    colours = _converted(image, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), colours).convert("RGB")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "LAB":
        image = ImageCms.applyTransform(image, _lab_to_rgb()) or image
    elif image.mode == "La":  # grey times its opacity: Pillow has no direct conversion to RGB
        image = image.convert("LA")
    return image if image.mode == mode else image.convert(mode)


@cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    lab, colours = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, colours, "LAB", "RGB")
