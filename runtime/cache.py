"""What one request may leave for the next: image embeddings, and the tokens whose keys and values are still there.

Keys are contents, never names, paths or sessions: whoever sends the same picture sends the same key, and nobody can
get at a picture without sending it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from runtime.api import Prompt

KNOWN_FILES = 4096
SMALL_FILE = 1 << 16
SMALL_FILES_BYTES = 16 << 20
Key: TypeAlias = "int | str"


@dataclass(frozen=True, slots=True)
class CacheStats:
    """State of the image cache; `hits` and `misses` count images since loading."""

    entries: int
    bytes: int
    limit_bytes: int
    hits: int
    misses: int


class ImageCache:
    """Embeddings by content hash and preprocessing hash, least recently used out first, bounded in bytes.

    Also remembers which file bytes decode to which content, so that a picture sent again need not be decoded again: large
    files by their hash, small ones as they are, since comparing them takes a quarter of the time. Used by one thread.
    """

    def __init__(self, limit_bytes: int, preprocess_sha256: str) -> None:
        self._limit = limit_bytes
        self._preprocess = preprocess_sha256
        self._entries: OrderedDict[tuple[str, str], tuple[Any, int]] = OrderedDict()
        self._digests: OrderedDict[bytes | str, str] = OrderedDict()
        self._bytes = self._hits = self._misses = self._file_bytes = 0

    def __contains__(self, digest: object) -> bool:
        return (digest, self._preprocess) in self._entries

    def get(self, digest: str) -> Any | None:
        """The embedding, or None; counts as a use."""
        key = (digest, self._preprocess)
        if key not in self._entries:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, digest: str, embeds_TD: Any) -> None:
        """Keep it; an embedding larger than the whole limit is not kept."""
        key, size = (digest, self._preprocess), int(embeds_TD.nbytes)
        if size > self._limit or key in self._entries:
            return
        self._entries[key] = (embeds_TD, size)
        self._bytes += size
        while self._bytes > self._limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self._bytes -= freed

    def digest_of(self, data: bytes) -> str | None:
        """Content hash of an encoded file seen before, if its embedding is still here."""
        digest = self._digests.get(_name(data))
        return digest if digest is not None and digest in self else None

    def remember(self, data: bytes, digest: str) -> None:
        name = _name(data)
        if name not in self._digests:
            self._file_bytes += len(name)
        self._digests[name] = digest
        while len(self._digests) > KNOWN_FILES or self._file_bytes > SMALL_FILES_BYTES:
            forgotten, _ = self._digests.popitem(last=False)
            self._file_bytes -= len(forgotten)

    def clear(self) -> None:
        self._entries.clear()
        self._digests.clear()
        self._bytes = self._file_bytes = 0

    @property
    def stats(self) -> CacheStats:
        return CacheStats(len(self._entries), self._bytes, self._limit, self._hits, self._misses)


def _name(data: bytes) -> bytes | str:
    """A file as it is remembered. A hash is text: as bytes, somebody could send it as a file and be taken for its owner."""
    return hashlib.sha256(data).hexdigest() if len(data) > SMALL_FILE else bytes(data)


class Context:
    """The tokens a backend's key-value cache holds, by content; the backend itself knows nothing of it."""

    def __init__(self) -> None:
        self._keys: list[Key] = []

    def shared(self, keys: Sequence[Key]) -> int:
        """How many leading tokens of a prompt are there already; at least one is always left to compute."""
        limit = max(min(len(self._keys), len(keys) - 1), 0)
        if self._keys[:limit] == list(keys[:limit]):  # the usual case of a chat, at the speed of C
            return limit
        return next(at for at in range(limit) if self._keys[at] != keys[at])

    def keep(self, tokens: int) -> None:
        del self._keys[tokens:]

    def add(self, keys: Sequence[Key]) -> None:
        self._keys += keys

    def add_one(self, key: Key) -> None:
        self._keys.append(key)


def prompt_keys(prompt: Prompt, tokens_per_image: int) -> list[Key]:
    """One key per prompt token: its id, or for a visual token the hash of the image it shows."""
    keys: list[Key] = list(prompt.ids)
    for image in prompt.images:
        keys[image.start : image.start + tokens_per_image] = [image.digest] * tokens_per_image
    return keys
