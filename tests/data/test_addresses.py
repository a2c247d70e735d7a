"""Images from files, data URIs and the network: all read, none too large, four lines for the rest."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from eqat_mm.data.image_text import addresses
from eqat_mm.data.image_text.addresses import image_at
from eqat_mm.errors import DataError
from tests.checkpoint.files import assert_four_lines

RED = (255, 0, 0)


def red_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), RED).save(file, "PNG")
    return file.getvalue()


class _Site(BaseHTTPRequestHandler):
    """A red image, and pages that are none."""

    def do_GET(self) -> None:
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/red.png")
            self.end_headers()
            return
        found = {"/red.png": red_png(), "/page.png": b"<html>", "/huge.png": bytes(3000)}.get(self.path)
        self.send_response(200 if found is not None else 404)
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def is_red(image: Image.Image) -> bool:
    return image.mode == "RGB" and image.size == (5, 4) and image.getpixel((2, 2)) == RED


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b.png").write_bytes(red_png())
    assert is_red(image_at(str(tmp_path / "a b.png")))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_red(image_at("~/a b.png"))


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:;BASE64,", "data:image/png;charset=utf-8;base64,"])
def test_data(head: str) -> None:
    assert is_red(image_at(head + base64.b64encode(red_png()).decode()))
    assert is_red(image_at(head + base64.encodebytes(red_png()).decode()))  # with line breaks


@pytest.mark.parametrize("page", ["red.png", "moved.png"])
def test_the_network_where_it_is_allowed(site: str, page: str) -> None:
    assert is_red(image_at(f"{site}/{page}", allow_network=True))


def refusal(address: str, *, allow_network: bool = False) -> DataError:
    with pytest.raises(DataError) as raised:
        image_at(address, allow_network=allow_network, where="/image")
    assert_four_lines(raised.value)
    assert raised.value.where == "/image" or address in ("", "~nobody-here/a.png")
    return raised.value


def test_the_network_is_not_asked_by_itself(site: str) -> None:
    refused = refusal(f"{site}/red.png")
    assert refused.given == f"{site}/red.png"
    assert "--allow_network" in refused.do


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("data:image/png;base64,????", "not base64"),
        ("data:image/png;base64,iVBORw0KGgo=", "unreadable"),
        ("data:image/png,%89PNG", "data:image/png"),
        ("data:image/png;base64,", "unreadable"),
        ("data:image/png;base64,caf\u00e9", "not base64"),
        ("ftp://here/a.png", "ftp://here/a.png"),
        ("s3://here/a.png", "s3://here/a.png"),
        ("missing.png", "missing"),
        ("a\0b.png", "unreadable"),
        ("/dev/zero", "unreadable"),
        ("/", "a folder"),
        ("", "no name"),
        ("~nobody-here/a.png", "home"),
    ],
)
def test_what_is_no_image_is_refused(address: str, said: str) -> None:
    assert said in refusal(address).given


@pytest.mark.parametrize(("page", "said"), [("page.png", "unreadable"), ("none.png", "404")])
def test_a_page_that_is_no_image_is_refused(site: str, page: str, said: str) -> None:
    assert said in refusal(f"{site}/{page}", allow_network=True).given


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:1/a.png", "http://[", "https://", "http:///a.png", "http://a b/", "http://\u65e5/\u672c"],
)
def test_nobody_answers(address: str) -> None:
    assert address in refusal(address, allow_network=True).given


def test_what_is_too_large_is_refused(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "MOST_BYTES", 2000)
    assert "more than 2,000 bytes" in refusal(f"{site}/huge.png", allow_network=True).given
    assert "more than 2,000 bytes" in refusal("data:image/png;base64," + "A" * 4000).given
    assert is_red(image_at(f"{site}/red.png", allow_network=True))
