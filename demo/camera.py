"""Frames of one camera on their way to a model that is slower than the camera: the newest wins, the rest is counted."""

from __future__ import annotations

import base64
import binascii
import threading
from dataclasses import dataclass, field

from runtime.api import EncodedImage
from runtime.clock import Clock, SystemClock
from vlm.errors import BadImage
from vlm.preprocess import MAX_BYTES

STALE_NS = 1_000_000_000  # a camera that sent nothing for so long is off, or its tab is closed


@dataclass(frozen=True)
class Frame:
    image: EncodedImage
    arrived_ns: int


@dataclass
class Feed:
    """One camera, from its first frame until it falls silent. Used by the page's event loop only.

    Attributes:
        received, answered, dropped: frames that came, that were answered, and that a newer one replaced unseen.
        html: what the tab shows at the moment.
        cancel: ends the answer that runs.
    """

    clock: Clock = field(default_factory=SystemClock)
    model: str = ""
    question: str = ""
    received: int = 0
    answered: int = 0
    dropped: int = 0
    html: str = ""
    started_ns: int = 0
    closed: bool = False
    cancel: threading.Event = field(default_factory=threading.Event)
    _waiting: Frame | None = None
    _last_ns: int = 0

    def put(self, image: EncodedImage) -> None:
        """A new frame; one that still waits is dropped for it."""
        now = self.clock.now_ns()
        self.started_ns = self.started_ns or now
        self.received += 1
        self.dropped += self._waiting is not None
        self._waiting, self._last_ns = Frame(image, now), now

    def take(self) -> Frame | None:
        """The newest frame not seen yet."""
        frame, self._waiting = self._waiting, None
        return frame

    @property
    def waits(self) -> bool:
        """Whether there is a frame to take."""
        return self._waiting is not None

    @property
    def silent(self) -> bool:
        """No frame for STALE_NS, or closed: nobody looks at the answers any more."""
        return self.closed or self.clock.now_ns() - self._last_ns > STALE_NS

    def close(self) -> None:
        self.closed = True
        self.cancel.set()


def frame_bytes(url: str) -> bytes:
    """`data:image/jpeg;base64,...` -> the encoded image.

    Raises:
        BadImage: something else, or over the size limit.
    """
    head, _, text = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")) or len(text) > MAX_BYTES * 4 // 3 + 4:
        raise BadImage("the camera sent something that is not an image")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise BadImage("the camera sent a damaged image") from None
