"""Images that users name: the path of a file, a data URI, or an address on the network where that is allowed."""

from __future__ import annotations

import base64
import re
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from eqat_mm.data.image_text.images import ImageBytes, ImageFile, ImageSource, read_image
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.data.user_files import told, user_path
from eqat_mm.errors import DataError

MOST_BYTES = 20 * 2**20
"""Of an image that is no file."""

_PATIENCE = 30  # seconds without an answer
_ON_THE_NETWORK = re.compile(r"https?:/", re.IGNORECASE)
_DATA = re.compile(r"data:(?P<kind>[^,]*),", re.IGNORECASE)
_OTHER = re.compile(r"(ftp|file|s3|gs|hf):/", re.IGNORECASE)
_ALLOWED = "the path of a file, data:image/...;base64,..., or with --allow_network an http(s) address"


def image_at(address: str, *, allow_network: bool = False, where: str = "--image") -> Any:
    """Return the image at an address, in mode RGB.

    Args:
        address: path, data URI, or http(s) address.
        allow_network: whether images may be fetched.
        where: what named it, for messages.

    Raises:
        DataError: it is missing, unreadable or too large, or no address that is allowed.
    """
    try:
        return read_image(_source(address, allow_network, where))
    except BadSample as error:
        raise DataError(where, str(error), "an image that Pillow can read", "check the path or address") from error


def _source(address: str, allow_network: bool, where: str) -> ImageSource:
    if data := _DATA.match(address):
        return ImageBytes(f"{address:.40}", _decoded(address[data.end() :], data["kind"], where))
    if _ON_THE_NETWORK.match(address):
        if not allow_network:
            do = "add --allow_network, or fetch the image and give its path"
            raise DataError(where, f"{address:.60}", _ALLOWED, do)
        return ImageBytes(address, _fetched(address, where))
    if _OTHER.match(address):
        raise DataError(where, f"{address:.60}", _ALLOWED, "fetch the image, and give its path")
    return ImageFile(user_path(address, _ALLOWED))


def _decoded(text: str, kind: str, where: str) -> bytes:
    if not kind.lower().endswith(";base64"):
        raise DataError(where, f"data:{kind:.40}", "data in base64: data:image/png;base64,...", "encode it in base64")
    if len(text) > MOST_BYTES * 4 // 3 + 4:
        raise _too_large(where, f"data of {len(text):,} characters")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise DataError(where, f"data that is not base64: {error}", _ALLOWED, "encode the file's bytes anew") from error


def _fetched(address: str, where: str) -> bytes:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "eqat-mm"})  # some refuse urllib's own
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            data: bytes = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()
        do = "check the address and the network, or give the path of a file"
        raise DataError(where, f"{address:.60}: {told(error)}", "an address that answers", do) from error
    if len(data) > MOST_BYTES:
        raise _too_large(where, f"{address:.60}")
    return data


def _too_large(where: str, given: str) -> DataError:
    allowed = f"up to {MOST_BYTES:,} bytes"
    return DataError(where, f"{given}, more than {MOST_BYTES:,} bytes", allowed, "save the image, and give its path")
