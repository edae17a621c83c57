"""Where an image of a record comes from, and whether it can be opened. No torch."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from vlm import preprocess
from vlm.errors import BadImage


@dataclass(frozen=True)
class FileSlice:
    """Bytes `offset` to `offset + size` of a file: an image inside a tar shard."""

    file: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        with self.file.open("rb") as f:
            f.seek(self.offset)
            return f.read(self.size)


@dataclass(frozen=True)
class Inline:
    """Encoded image bytes that came with the record."""

    data: bytes
    name: str


ImageSource: TypeAlias = Path | FileSlice | Inline | Image.Image


def source_name(source: ImageSource) -> str:
    if isinstance(source, Path):
        return str(source)
    return "a decoded image" if isinstance(source, Image.Image) else source.name


def open_source(source: ImageSource) -> Image.Image:
    """Decode an image into RGB.

    Raises:
        BadImage: missing, truncated, too large, or of a format that is not allowed.
    """
    if isinstance(source, Image.Image):
        return preprocess.to_rgb(source)
    if isinstance(source, Path):
        return preprocess.open_image(source)
    return preprocess.open_image(_encoded(source))


def from_data_url(url: str, name: str) -> Inline:
    """An image written into the record as `data:image/png;base64,...`.

    Raises:
        BadImage: not base64.
    """
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return Inline(base64.b64decode(body, validate=True), name)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"a damaged data URL ({error})") from None


@dataclass(frozen=True)
class Probe:
    """What looking at one image found: a digest that identifies it, or why it cannot be used."""

    digest: bytes
    problem: str | None = None


def probe(source: ImageSource, decode: bool) -> Probe:
    """Look at one image as training would.

    With `decode` the image is opened to the last byte and identified by its content; without, only a missing file is
    noticed and a file is identified by its name.
    """
    if isinstance(source, Path) and not source.is_file():
        return Probe(digest(str(source).encode()), f"no file at {source}; check --images")
    if not decode:
        return Probe(digest(source_name(source).encode() if isinstance(source, Path) else _encoded(source)))
    try:
        if isinstance(source, Image.Image):
            return Probe(digest(_encoded(source)))
        data = _encoded(source)
        preprocess.open_image(data)
        return Probe(digest(data))
    except BadImage as error:
        shown = str(error).replace("the image", source_name(source), 1)
        return Probe(digest(source_name(source).encode()), shown)
    except OSError as error:
        return Probe(b"", f"{source_name(source)} cannot be read ({error.strerror})")


def _encoded(source: ImageSource) -> bytes:
    if isinstance(source, Image.Image):
        return source.tobytes()
    if isinstance(source, Inline):
        return source.data
    return source.read_bytes() if isinstance(source, Path) else source.read()


def digest(data: bytes) -> bytes:
    """Eight bytes that identify content."""
    return hashlib.blake2b(data, digest_size=8).digest()
