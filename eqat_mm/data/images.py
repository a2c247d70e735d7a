"""Images with Pillow: where they are, whether they can be opened, and their pixels as RGB, upright.

Pillow's limit against decompression bombs stays on: above twice `Image.MAX_IMAGE_PIXELS` (179 million pixels) an
image counts as unreadable.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqat_mm.data.problems import BadSample

_ORIENTATION = 0x0112  # EXIF tag
_ON_ITS_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def file(self) -> Path:
        """Return what Pillow opens."""
        return self.path


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


ImageSource = ImageFile | TableImage


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


def image_size(source: ImageSource) -> tuple[int, int]:
    """Open an image as far as its header and return (height, width) in pixels, turned as EXIF says.

    The header is parsed and, of PNG files, every checksum is compared; pixels are not decoded. A JPEG file that
    was cut off in the middle is therefore found only when it is read.

    Raises:
        BadSample: the image is missing or unreadable.
    """
    from PIL import Image

    with _opened(source) as image:
        width, height = image.size
        # The base class's method: that of PNG files decodes the pixels, in case the tag is behind them.
        orientation = Image.Image.getexif(image).get(_ORIENTATION)
        lies = orientation in _ON_ITS_SIDE and image.format != "TIFF"  # Pillow turns these itself
        image.verify()
    return (width, height) if lies else (height, width)


def read_image(source: ImageSource) -> Any:
    """Return an image as Pillow's mode RGB, turned as EXIF says.

    Transparency is dropped; 16-bit grey becomes 8-bit grey by its upper byte.

    Raises:
        BadSample: the image is missing or unreadable.
    """
    from PIL import ImageOps

    with _opened(source) as image:
        return _rgb(ImageOps.exif_transpose(image))


@contextmanager
def _opened(source: ImageSource) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(source.file()) as image:
            yield image
    except FileNotFoundError as error:
        raise BadSample(f"image {source} is missing") from error
    # What Pillow's plugins raise for broken files, and its limit for large ones
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadSample(f"image {source} is unreadable ({error})") from error


def _rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):
        import numpy as np

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:  # a palette with transparency converts only by way of its colours
        image = image.convert("RGBA")
    return image.convert("RGB")
