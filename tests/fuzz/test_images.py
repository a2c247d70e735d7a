"""Images of all formats that Pillow writes, damaged: RGB of a bounded size, or a bad sample."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eqat_mm.data.image_text.images import FORMATS, MOST_PIXELS, ImageFile, image_size, read_image
from tests.fuzz.allowed import only_our_errors
from tests.fuzz.damage import damaged


def _saved(format: str, mode: str, **options: object) -> bytes | None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):  # about formats that Pillow is giving up
            image.save(buffer, format, **({"exif": exif} | options))
    except (
        OSError,
        KeyError,
        ValueError,
        SystemError,
        AttributeError,
        struct.error,
    ):  # not every format takes every mode
        return None
    return buffer.getvalue()


def _all_saved() -> dict[str, list[bytes]]:
    Image.init()
    modes = ("RGB", "L", "P", "1", "RGBA", "CMYK", "I", "F", "I;16", "LA", "YCbCr", "LAB")
    return {
        format: kept
        for format in sorted(Image.SAVE)
        if (kept := [data for mode in modes if (data := _saved(format, mode)) is not None])
    }


_OF_FORMAT = _all_saved()
_OF_OURS = [data for format, every in _OF_FORMAT.items() if format in FORMATS for data in every]
for _options in ({"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_deflate"}):
    _OF_OURS.append(_saved("TIFF", "RGB", **_options) or b"")
for _progressive in (True, False):
    _OF_OURS.append(_saved("JPEG", "RGB", progressive=_progressive, quality=30) or b"")
_OTHERS = [data for format, every in _OF_FORMAT.items() if format not in FORMATS for data in every]


def _read(path: ImageFile) -> None:
    with only_our_errors():
        height, width = image_size(path)
        assert 0 < height * width <= MOST_PIXELS
        image = read_image(path)
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= MOST_PIXELS
    with only_our_errors():
        read_image(path)


@given(data=damaged(st.sampled_from(_OF_OURS)))
def test_damaged_images(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    _read(ImageFile(path))


@given(
    data=damaged(st.sampled_from(_OTHERS)) | st.binary(), suffix=st.sampled_from(["", ".png", ".eps", ".dds", ".tga"])
)
def test_images_of_other_formats(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"other{suffix}"
    path.write_bytes(data)
    _read(ImageFile(path))


def test_the_cases_are_of_all_our_formats() -> None:
    assert {Image.open(io.BytesIO(data)).format for data in _OF_OURS} == set(FORMATS)
    assert len(_OF_FORMAT) > 20
