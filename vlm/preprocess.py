"""Image bytes -> pixels, identical in training, export checks and on the board. Pillow and NumPy only.

Shape legend: C = 3 channels, H = height, W = width.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm.errors import BadImage, CheckpointError
from vlm.files import read_json

MAX_PIXELS = 40_000_000
MAX_BYTES = 64 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")

Pixels = npt.NDArray[np.float32]
Resize = Literal["stretch", "shortest_edge_crop"]


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the tensor a vision tower was trained on.

    Attributes:
        size: side of the square input in pixels.
        resize: `stretch` to the square, or scale the shortest edge and crop the centre (CLIP).
        resample: Pillow filter number (1 Lanczos, 2 bilinear, 3 bicubic).
        mean, std: per channel, applied after scaling to 0..1.
        tokens: visual tokens one image takes in the prompt.
    """

    size: int
    resize: Resize
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: int

    @staticmethod
    def from_json(value: dict[str, Any]) -> ImageSpec:
        return ImageSpec(
            size=int(value["size"]),
            resize=value["resize"],
            resample=int(value["resample"]),
            mean=_triple(value["mean"]),
            std=_triple(value["std"]),
            tokens=int(value["tokens"]),
        )


def _triple(values: list[float]) -> tuple[float, float, float]:
    r, g, b = values
    return float(r), float(g), float(b)


def spec_from_checkpoint(directory: Path) -> ImageSpec:
    """Read the spec from a Hugging Face checkpoint directory (config.json and its processor file).

    Raises:
        CheckpointError: a file is missing or asks for preprocessing this project does not reproduce.
    """
    try:
        return _spec(directory, read_json(directory / "config.json"), _processor_config(directory))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: image settings are incomplete ({error!r}); save model and processor again"
        ) from None


def _spec(directory: Path, config: dict[str, Any], processor: dict[str, Any]) -> ImageSpec:
    image = processor.get("image_processor", processor)
    size = image.get("size") or {}
    resize: Resize
    kind = config.get("model_type")
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        side, resize = _pinned_area(directory, image), "stretch"
    elif kind in ("smolvlm", "idefics3"):
        side, resize = _one_tile(directory, image), "stretch"
    elif "height" in size and size["height"] == size.get("width"):
        side, resize = int(size["height"]), "stretch"
    elif "shortest_edge" in size and image.get("do_center_crop"):
        crop = image.get("crop_size", {})
        if crop.get("height") != size["shortest_edge"] or crop.get("width") != size["shortest_edge"]:
            raise CheckpointError(f"crop_size {crop} differs from shortest_edge {size['shortest_edge']} in {directory}")
        side, resize = int(size["shortest_edge"]), "shortest_edge_crop"
    else:
        raise CheckpointError(f"image size {size} in {directory} is not a fixed square; use a fixed-resolution tower")
    if abs(float(image.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-9 or not image.get("do_normalize", True):
        raise CheckpointError(f"{directory} rescales or normalises in a way this project does not reproduce")
    tokens = _tokens(directory, config, side)
    return ImageSpec(
        side, resize, int(image.get("resample", 3)), _triple(image["image_mean"]), _triple(image["image_std"]), tokens
    )


def _tokens(directory: Path, config: dict[str, Any], side: int) -> int:
    """Visual tokens an image takes in the prompt."""
    kind, vision = config.get("model_type"), config["vision_config"]
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        patch = int(vision.get("patch_size", 16 if kind == "qwen3_vl" else 14)) * int(
            vision.get("spatial_merge_size", 2)
        )
        if side % patch:
            raise CheckpointError(f"{directory}: image side {side} is no multiple of {patch} pixels (merged patches)")
        return int((side // patch) ** 2)
    # what equals a class's default need not be stored
    usual = 32 if vision.get("model_type") == "clip_vision_model" else 16
    tokens = (int(vision.get("image_size", 224)) // int(vision.get("patch_size", usual))) ** 2
    if kind in ("smolvlm", "idefics3"):
        if int(vision.get("image_size", side)) != side:
            raise CheckpointError(
                f"{directory}: the tower takes {vision['image_size']} pixels, the processor makes {side}"
            )
        return int(tokens // int(config["scale_factor"]) ** 2)
    if kind == "llava_onevision":
        return tokens + 1  # the base tile and its newline
    tokens += vision["model_type"] == "clip_vision_model"  # its class token
    # the first token is taken off, whatever it is
    return tokens - (config.get("vision_feature_select_strategy", "default") == "default")


def _pinned_area(directory: Path, image: dict[str, Any]) -> int:
    """Side of the square that Qwen-VL's processor is held to: least and most pixels are the same square number."""
    size = image.get("size") or {}
    least = image.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = image.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    side = math.isqrt(int(least or 0))
    if least is None or least != most or side * side != int(least):
        raise CheckpointError(
            f"{directory}: images of {least} to {most} pixels; distillation needs one square size, so set size to "
            '{"shortest_edge": 200704, "longest_edge": 200704} (448 x 448) in its preprocessor_config.json'
        )
    return side


def _one_tile(directory: Path, image: dict[str, Any]) -> int:
    """Side of the only tile of an Idefics3-type processor that does not split."""
    edge, tile = (image.get(name, {}).get("longest_edge") for name in ("size", "max_image_size"))
    if image.get("do_image_splitting", True) or edge is None or edge != tile:
        raise CheckpointError(
            f"{directory}: images are split into tiles; distillation needs one tile, so set do_image_splitting to false "
            f"and size.longest_edge to max_image_size.longest_edge ({tile}) in its preprocessor_config.json"
        )
    return int(edge)


def _processor_config(directory: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            return read_json(directory / name)
    raise CheckpointError(f"{directory} has no preprocessor_config.json or processor_config.json")


def open_image(source: Path | bytes) -> Image.Image:
    """Decode an image safely into RGB: size caps before decoding, EXIF turned, alpha on white, first frame.

    Raises:
        BadImage: missing, truncated, too large, or not one of FORMATS.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    _quiet_bomb_warning()
    try:
        data = source if isinstance(source, bytes) else _read_limited(source)
        if len(data) > MAX_BYTES:
            raise BadImage(f"{name} has {len(data)} bytes, more than {MAX_BYTES}; send a smaller file")
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(
                f"{name} is {width}x{height}, more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down first"
            )
        image.load()
        image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise BadImage(f"no image at {name}; check the path") from None
    except IsADirectoryError:
        raise BadImage(f"{name} is a directory; name one image file") from None
    except PermissionError:
        raise BadImage(f"{name} cannot be read (permission denied)") from None
    except UnidentifiedImageError:
        raise BadImage(f"{name} is not a readable image; allowed: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadImage(f"{name} has more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise BadImage(f"{name} is damaged ({error}); save it again") from None
    return to_rgb(image)


@functools.cache
def _quiet_bomb_warning() -> None:
    """Our own pixel limit is lower than Pillow's and refuses with a clear message; its warning would only add noise."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(MAX_BYTES + 1)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """RGB image of any size -> RGB image of spec.size x spec.size."""
    if spec.resize == "stretch":
        return image.resize((spec.size, spec.size), resample=spec.resample)
    width, height = image.size
    scale = spec.size / min(width, height)
    # the library this mirrors truncates the long edge
    new = (spec.size, int(height * scale)) if width <= height else (int(width * scale), spec.size)
    image = image.resize(new, resample=spec.resample)
    left, top = (image.width - spec.size) // 2, (image.height - spec.size) // 2
    return image.crop((left, top, left + spec.size, top + spec.size))


def normalise(image: Image.Image, spec: ImageSpec) -> Pixels:
    """RGB image already at spec.size -> pixels_CHW, float32."""
    rgb_HWC = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(((rgb_HWC - mean) / std).transpose(2, 0, 1))


def pixels(image: Image.Image, spec: ImageSpec) -> Pixels:
    """RGB image of any size -> pixels_CHW, float32."""
    return normalise(resize(image, spec), spec)


def image_digest(image: Image.Image) -> str:
    """Content hash of an RGB image: the key under which embeddings may be cached."""
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
