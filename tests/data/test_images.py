"""Any image becomes upright RGB; what cannot be opened is named."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from eqat_mm.data.image_text.images import ImageFile, TableImage, file_below, image_size, read_image
from eqat_mm.data.image_text.problems import BadSample


def _saved(path: Path, image: Image.Image, **options: Any) -> ImageFile:
    image.save(path, **options)
    return ImageFile(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    read = read_image(_saved(tmp_path / f"a.{suffix}", Image.new(mode, (3, 2))))
    assert (read.mode, read.size) == ("RGB", (3, 2))


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    read = np.asarray(read_image(_saved(tmp_path / "a.png", Image.fromarray(grey))))
    assert read[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (read == read[..., :1]).all()


@pytest.mark.parametrize("suffix", ["tif", "ppm"])
def test_grey_in_32_bit_integers_is_16_bit_grey_where_that_is_clear(tmp_path: Path, suffix: str) -> None:
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.int32)
    source = _saved(tmp_path / f"a.{suffix}", Image.fromarray(grey))
    assert np.asarray(read_image(source))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert image_size(source) == (1, 5)


def test_grey_in_floats_from_0_to_1_is_grey(tmp_path: Path) -> None:
    grey = np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)
    assert np.asarray(read_image(_saved(tmp_path / "a.tif", Image.fromarray(grey))))[0, :, 0].tolist() == [
        0,
        64,
        128,
        255,
    ]


@pytest.mark.parametrize("look", [image_size, read_image])
@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 200]], np.int32),
        np.array([[-1, 60_000]], np.int32),
        np.array([[0, 65_536]], np.int32),
        np.array([[0, 200]], np.float32),
        np.array([[-0.1, 1]], np.float32),
        np.array([[0, np.nan]], np.float32),
    ],
    ids=str,
)
def test_grey_whose_white_is_not_clear_is_refused_before_training(tmp_path: Path, values: Any, look: Any) -> None:
    with pytest.raises(BadSample, match=r"a\.tif is unreadable .* which of them is white is not clear"):
        look(_saved(tmp_path / "a.tif", Image.fromarray(values)))


@pytest.mark.parametrize("look", [image_size, read_image])
def test_memory_is_bounded(tmp_path: Path, look: Any) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (8193, 8192)).save(path)
    with pytest.raises(BadSample, match=r"8,193 x 8,192 pixels, more than 67,108,864"):
        look(ImageFile(path))


@pytest.mark.parametrize("look", [image_size, read_image])
def test_a_pipe_is_not_opened(tmp_path: Path, look: Any) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadSample, match="a pipe, a socket or a device"):
        look(ImageFile(tmp_path / "a.png"))


@pytest.mark.parametrize("format", ["EPS", "PDF", "DDS", "SPIDER", "BLP"])
def test_other_formats_are_not_opened(tmp_path: Path, format: str) -> None:
    saved = io.BytesIO()  # not a file: Pillow would take its suffix for that of the format
    Image.new({"SPIDER": "F", "BLP": "P"}.get(format, "RGB"), (8, 8)).save(saved, format)
    (tmp_path / "a.png").write_bytes(saved.getvalue())
    with pytest.raises(BadSample, match="none of AVIF, BMP"):
        read_image(ImageFile(tmp_path / "a.png"))


def test_whatever_a_plugin_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _saved(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    for error in (NotImplementedError, RuntimeError, AttributeError, MemoryError, struct.error, RecursionError):

        def refuse(*_: Any, error: type[Exception] = error) -> None:
            raise error("no")

        monkeypatch.setattr(PngImageFile, "load", refuse)
        with pytest.raises(BadSample, match=rf"a\.png is unreadable \({error.__name__}: no\)"):
            read_image(source)


def test_a_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    read = read_image(_saved(tmp_path / "a.png", image, transparency=b"\x80\xff"))
    assert [read.getpixel((column, 0)) for column in range(2)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))], ids=str)
def test_images_are_turned_as_exif_says(tmp_path: Path, suffix: str, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = _saved(tmp_path / f"a.{suffix}", image, exif=exif)
    read = read_image(source)
    assert read.size == ((32, 64) if orientation in (6, 8) else (64, 32))
    assert image_size(source) == (read.height, read.width)
    red, green, blue = read.getpixel((corner[0] * 16 + 8, corner[1] * 16 + 8))
    assert red > 200
    assert max(green, blue) < 60


def test_images_in_a_table_are_read_from_their_bytes() -> None:
    def png(colour: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.new("RGB", (2, 3), colour).save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = [{"image": png("red")}, {"image": [png("lime"), png("blue")]}]
    assert read_image(TableImage(rows, 0, 0)).getpixel((0, 0)) == (255, 0, 0)
    assert read_image(TableImage(rows, 1, 1)).getpixel((0, 0)) == (0, 0, 255)
    assert image_size(TableImage(rows, 1, 0)) == (3, 2)


@pytest.mark.parametrize("path", ["../a.png", "/etc/a.png", "b/../../a.png", "..", "b/../../images/a.png"])
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(BadSample, match="leaves the image folder") as caught:
        file_below(tmp_path / "images", path)
    assert path in str(caught.value)


@pytest.mark.parametrize("path", ["a.png", "b/a.png", "b/../a.png", "./a.png", "..a.png"])
def test_a_path_in_the_folder_is_taken(tmp_path: Path, path: str) -> None:
    assert file_below(tmp_path, path).path.is_relative_to(tmp_path)


def test_a_link_of_the_users_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    _saved(tmp_path / "elsewhere" / "a.png", Image.new("RGB", (4, 5)))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "elsewhere")
    assert image_size(file_below(tmp_path / "images", "coco/a.png")) == (5, 4)


@pytest.mark.parametrize("look", [image_size, read_image])
def test_a_missing_image_is_named(tmp_path: Path, look: Any) -> None:
    with pytest.raises(BadSample, match=r"a\.png is missing"):
        look(ImageFile(tmp_path / "a.png"))


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "folder", "flipped"])
def test_an_unreadable_png_is_found_without_decoding(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        flipped = data[:1000] + bytes([data[1000] ^ 255]) + data[1001:]
        path.write_bytes({"text": b"no image", "empty": b"", "cut": data[:-500], "flipped": flipped}[damage])
    with pytest.raises(BadSample, match=r"a\.png is unreadable"):
        image_size(ImageFile(path))


def test_a_jpeg_that_was_cut_off_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    assert image_size(ImageFile(path)) == (64, 64)
    with pytest.raises(BadSample, match=r"a\.jpg is unreadable"):
        read_image(ImageFile(path))
