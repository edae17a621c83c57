"""Pixels equal the Hugging Face processors'; bad images are refused in one line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from tests.tiny import make_student
from vlm import preprocess
from vlm.errors import BadImage


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 37), (37, 100), (8, 8), (641, 480)])
def test_pixels_equal_the_hugging_face_processor(tower: str, size: tuple[int, int], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    directory = make_student(tmp_path / tower, tower=tower, feature_layer=-2)
    spec = preprocess.spec_from_checkpoint(directory)
    image = noise(*size)
    theirs = AutoProcessor.from_pretrained(directory).image_processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(preprocess.pixels(image, spec), theirs, atol=1e-6)


def test_spec_survives_json(tmp_path: Path) -> None:
    import dataclasses
    import json

    spec = preprocess.spec_from_checkpoint(make_student(tmp_path / "s"))
    assert preprocess.ImageSpec.from_json(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


def test_alpha_goes_onto_white_and_exif_is_turned() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert preprocess.open_image(png(clear)).getpixel((0, 0)) == (255, 255, 255)
    tall = Image.new("RGB", (2, 6), (1, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    tall.save(buffer, "JPEG", exif=exif)
    assert preprocess.open_image(buffer.getvalue()).size == (6, 2)


def huge_png(width: int, height: int) -> bytes:
    """A valid PNG header that promises many pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD = {
    "empty": b"",
    "text": b"hello, I am not an image",
    "truncated": png(noise(64, 64))[:900],
    "100 megapixels": huge_png(10_000, 10_000),
    "bomb": huge_png(50_000, 50_000),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "flipped byte": png(noise(64, 64))[:60] + b"\xff" + png(noise(64, 64))[61:],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        preprocess.open_image(BAD[name])
    assert "\n" not in caught.value.message
    if name in ("100 megapixels", "bomb"):
        assert "megapixels" in caught.value.message


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadImage, match=path.name):
            preprocess.open_image(path)


def test_digest_depends_on_content_and_shape() -> None:
    one, other = noise(8, 4), noise(8, 4, seed=1)
    assert preprocess.image_digest(one) == preprocess.image_digest(one.copy())
    assert preprocess.image_digest(one) != preprocess.image_digest(other)
    assert preprocess.image_digest(Image.new("RGB", (2, 8))) != preprocess.image_digest(Image.new("RGB", (8, 2)))


@pytest.mark.parametrize("mode", get_args(preprocess.Resize))
@pytest.mark.parametrize("resample", range(6))
def test_resizing_again_changes_nothing(mode: preprocess.Resize, resample: int) -> None:
    """What the exporter relies on when it holds photos at the size of the tower."""
    for size, width, height in ((7, 31, 50), (64, 64, 64), (56, 301, 57), (336, 336, 337), (40, 12, 90), (49, 1, 3)):
        spec = preprocess.ImageSpec(size, mode, resample, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1)
        image = preprocess.resize(noise(width, height), spec)
        assert image.size == (size, size)
        np.testing.assert_array_equal(np.asarray(preprocess.resize(image, spec)), np.asarray(image))
