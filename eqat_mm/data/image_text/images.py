"""Images with Pillow: where they are, whether they can be opened, and their pixels as RGB, upright.

A record may name anything, and Pillow's plugins raise what they like about broken files. So only regular files are
opened, only in the formats of `FORMATS` (none that Pillow hands to other programs, as EPS), only up to `MOST_PIXELS`,
and whatever is raised makes the image unreadable.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqat_mm.data.image_text.problems import BadSample, MissingImage, UnreadableImage
from eqat_mm.data.user_files import NO_FILE, fault_of, told

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**26
"""Of an image: 8192 x 8192. Pixels in RGB are then 200 MB, before the model's processor makes them small."""

_ORIENTATION = 0x0112  # EXIF tag
_ON_ITS_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def file(self) -> Path:
        """Return what Pillow opens.

        Raises:
            BadSample: no regular file is there.
        """
        fault = fault_of(self.path)
        if fault is None:
            return self.path
        if fault == NO_FILE:
            raise MissingImage(f"image {self} is missing")
        raise UnreadableImage(f"image {self} is unreadable ({fault})")


@dataclass(frozen=True)
class TableImage:
    """An image in the column `image` of a table, the `position`-th of its row; read when it is needed."""

    rows: Sequence[Any]
    row: int
    position: int

    def __str__(self) -> str:
        return f"image {self.position} of row {self.row}"

    def file(self) -> io.BytesIO:
        """Return what Pillow opens."""
        value = self.rows[self.row]["image"]
        return io.BytesIO((value[self.position] if isinstance(value, list) else value)["bytes"])


@dataclass(frozen=True)
class ImageBytes:
    """An image that is nowhere but here: the contents of a file, and what it is called in messages."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def file(self) -> io.BytesIO:
        """Return what Pillow opens."""
        return io.BytesIO(self.content)


ImageSource = ImageFile | TableImage | ImageBytes

Size = tuple[int, int]
"""Height and width in pixels."""


def file_below(folder: Path, path: str) -> ImageFile:
    """Return the image at `path`, relative to `folder`.

    Links are followed, wherever they lead: the user put them there, not the record.

    Raises:
        BadSample: the path leaves the folder.
    """
    inside = os.path.normpath(path)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
        raise BadSample(f"the path {path} leaves the image folder {folder}")
    return ImageFile(folder / inside)


def image_size(source: ImageSource) -> Size:
    """Open an image as far as its header and return (height, width) in pixels, turned as EXIF says.

    The header is parsed and, of PNG files, every checksum is compared; pixels are decoded only where their range must
    be known (see `read_image`). A JPEG file that was cut off in the middle is therefore found only when it is read.

    Raises:
        BadSample: the image is missing, unreadable or too large.
    """
    from PIL import Image

    with _opened(source) as image:
        width, height = image.size
        # The base class's method: that of PNG files decodes the pixels, in case the tag is behind them.
        orientation = Image.Image.getexif(image).get(_ORIENTATION)
        lies = orientation in _ON_ITS_SIDE and image.format != "TIFF"  # Pillow turns these itself
        if image.mode in ("I", "F"):
            _in_eight_bits(image)
        else:
            image.verify()
    return (width, height) if lies else (height, width)


def decoded_size(source: ImageSource) -> Size:
    """Decode an image and return (height, width) in pixels, turned as EXIF says.

    Raises:
        BadSample: the image is missing, unreadable or too large.
    """
    width, height = read_image(source).size
    return height, width


def read_image(source: ImageSource) -> Any:
    """Return an image as Pillow's mode RGB, turned as EXIF says.

    Transparency is dropped; 16-bit grey becomes 8-bit grey by its upper byte. Of grey in 32-bit integers or floats,
    white is known only from the values: it is 65,535 where the largest integer is between 256 and that, and 1 where
    floats are between 0 and 1.

    Raises:
        BadSample: the image is missing, unreadable or too large, or which of its values is white is not clear.
    """
    from PIL import ImageOps

    with _opened(source) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


@contextmanager
def _opened(source: ImageSource) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        with Image.open(source.file(), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            _require_bounded(image, source)
            yield image
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise UnreadableImage(f"image {source} is unreadable (none of {known})") from error
    except Exception as error:
        raise UnreadableImage(f"image {source} is unreadable ({told(error)})") from error


def _require_bounded(image: Any, source: ImageSource) -> None:
    width, height = image.size
    if not 0 < width * height <= MOST_PIXELS:
        raise UnreadableImage(f"image {source} is {width:,} x {height:,} pixels, more than {MOST_PIXELS:,} or none")


def _rgb(image: Any) -> Any:
    image = _in_eight_bits(image)
    if "transparency" in image.info:  # a palette with transparency converts only by way of its colours
        image = image.convert("RGBA")
    return image.convert("RGB")


def _in_eight_bits(image: Any) -> Any:
    """Return an image whose grey values have 8 bits, where they had more; any other as it is."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    least, most = values.min(), values.max()
    if image.mode == "F" and least >= 0 and most <= 1:
        return Image.fromarray((values * 255).round().astype(np.uint8))
    # Pillow's reader of PPM files itself scales what has more than 8 bits to 65,535.
    if image.mode == "I" and least >= 0 and most < 2**16 and (most >= 2**8 or image.format == "PPM"):
        return Image.fromarray((values >> 8).astype(np.uint8))
    raise ValueError(f"grey values from {least:g} to {most:g} in 32 bits: which of them is white is not clear")
