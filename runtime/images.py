"""Images on their way into a request: read, decode, and the message form every student is trained on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from runtime.api import EncodedImage, Image, Message, Part
from vlm import chat, preprocess
from vlm.errors import BadImage


def read_image(path: Path) -> EncodedImage:
    """File -> bytes, not decoded yet.

    Raises:
        BadImage: missing, a directory, unreadable or over the size limit.
    """
    try:
        with path.open("rb") as f:
            data = f.read(preprocess.MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadImage(f"no image at {path}; check the path") from None
    except IsADirectoryError:
        raise BadImage(f"{path} is a directory; name one image file") from None
    except OSError as error:
        raise BadImage(f"{path} cannot be read ({error.strerror})") from None
    return EncodedImage(data, str(path))


def decode_image(encoded: EncodedImage) -> Image:
    """Encoded bytes -> RGB and digest.

    Raises:
        BadImage: damaged, too large or not an allowed format; named as the sender named it.
    """
    try:
        return from_pillow(preprocess.open_image(encoded.data))
    except BadImage as error:
        raise BadImage(error.message.replace("the image", encoded.name, 1)) from None


def image_size(encoded: EncodedImage) -> tuple[int, int]:
    """Width and height from the header alone.

    Raises:
        BadImage: not an allowed format.
    """
    try:
        return Pillow.open(io.BytesIO(encoded.data), formats=preprocess.FORMATS).size
    except Pillow.DecompressionBombError:
        limit = f"{preprocess.MAX_PIXELS / 1e6:.0f} million pixels"
        raise BadImage(f"{encoded.name} has more than {limit}; scale it down first") from None
    except Exception:  # a decoder may raise anything over a hostile header
        raise BadImage(f"{encoded.name} is not a readable image; allowed: {', '.join(preprocess.FORMATS)}") from None


def from_pillow(image: Pillow.Image) -> Image:
    """Any Pillow image -> Image (alpha on white)."""
    rgb = preprocess.to_rgb(image)
    return Image(np.asarray(rgb), preprocess.image_digest(rgb))


def from_rgb(rgb: npt.NDArray[np.uint8]) -> Image:
    """rgb uint8 [H, W, 3] -> Image."""
    return Image(rgb, preprocess.image_digest(Pillow.fromarray(rgb)))


def to_pillow(image: Image) -> Pillow.Image:
    return Pillow.fromarray(image.rgb)


def question(text: str, *images: EncodedImage | Image) -> Message:
    """The user turn every student here is trained on: the images, a line break, the question."""
    parts: list[Part] = list(images)
    trained = chat.user_message(text, len(images))["content"]
    return Message("user", (*parts, trained[-1]["text"]))


def answer(text: str) -> Message:
    """An assistant turn, to be sent back as history."""
    return Message("assistant", (text,))


def chat_message(message: Message) -> chat.Message:
    """Message -> the form `vlm.chat` renders."""
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.content]
    if message.role == "assistant" or (message.role == "system" and all("text" in p for p in parts)):
        return {"role": message.role, "content": "".join(p.get("text", "") for p in parts)}
    return {"role": message.role, "content": parts}
