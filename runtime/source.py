"""A directory on disk -> what every backend reads from it: pixels, template, tokenizer, sizes. Never a default.

Needs `tokenizers` and `jinja2`; never torch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from runtime.api import Image, Message, ModelInfo, PreparedImage, Prompt
from runtime.images import chat_message, to_pillow
from runtime.options import Latents, LoadOptions
from runtime.text import ByteLevelPieces
from vlm.chat import ChatSpec, ChatTokenizer
from vlm.errors import ArtifactError, MissingPiece, UserError
from vlm.manifest import NAME, Manifest, check_files, read_manifest
from vlm.preprocess import ImageSpec

# what a board must hold to answer; the rest of an artefact is evidence and files for other programs
RUN_ROLES = frozenset(
    ("vision_encoder", "embed_tokens", "decoder", "external_data", "text_gguf", "mmproj", "tokenizer")
)


@dataclass(frozen=True)
class Source:
    """A checked artefact, or a checkpoint seen the same way.

    Attributes:
        model: numbers about the decoder (see Manifest.model); only `vocab_size` and `context_length` are required.
        manifest: None for a checkpoint.
        latents: see LoadOptions.
    """

    root: Path
    image: ImageSpec
    tokenizer: ChatTokenizer
    model: dict[str, Any]
    precision: str
    artifact_bytes: int
    weights_sha256: str | None
    manifest: Manifest | None = None
    latents: Latents = "emit"

    def __post_init__(self) -> None:
        if self.latents == "prefill" and not self.tokenizer.spec.latent_token_ids:
            raise UserError(f"{self.root} has no latent tokens to put into the prompt; drop `--latents prefill`")

    def info(self, backend: str, options: LoadOptions) -> ModelInfo:
        def number(key: str) -> int | None:
            return None if self.model.get(key) is None else int(self.model[key])

        return ModelInfo(
            name=self.root.resolve().name,
            backend=backend,
            device=options.device,
            precision=self.precision,
            threads=options.threads,
            context_length=min(int(self.model["context_length"]), options.context),
            vocab_size=int(self.model["vocab_size"]),
            tokens_per_image=self.image.tokens,
            eos_token_ids=self.tokenizer.spec.eos_token_ids,
            artifact_bytes=self.artifact_bytes,
            weights_sha256=self.weights_sha256,
            decoder_weight_bytes=number("decoder_weight_bytes"),
            lm_head_bytes=number("lm_head_bytes"),
            kv_bytes_per_token=number("kv_bytes_per_token"),
            verified=None if self.manifest is None else self.manifest.verified,
            preprocess_sha256=hashlib.sha256(repr(self.image).encode()).hexdigest(),
        )

    @functools.cached_property
    def pieces(self) -> Mapping[int, str | bytes] | None:
        """Text of every token by itself; None for a tokenizer where it depends on the tokens around."""
        from tokenizers.decoders import ByteLevel

        tokenizer = self.tokenizer.tokenizer
        if not isinstance(tokenizer.decoder, ByteLevel):
            return None
        return ByteLevelPieces(tokenizer, self.tokenizer.special_ids)

    def path_of(self, role: str) -> Path:
        if self.manifest is None:
            raise ArtifactError(f"{self.root} has no {NAME}; export it first")
        return self.manifest.path_of(self.root, role)

    def prompt(
        self,
        messages: Sequence[Message],
        to_pixels: Callable[[Pillow.Image, ImageSpec], Any],
        at_hand: Container[str] = frozenset(),
    ) -> Prompt:
        """Template and tokenise; `to_pixels` makes of each image not `at_hand` what the backend's vision tower takes.

        Raises:
            UserError: nothing is asked, or the chat template refuses the conversation.
        """
        if not messages or messages[-1].role != "user":
            raise UserError("the conversation must end with a user message; add the question")
        try:
            ids = self.tokenizer.prompt_ids([chat_message(message) for message in messages])
        except UserError:
            raise
        except Exception as error:  # a template may raise anything: it is a program that came with the model
            raise UserError(f"the chat template refuses this conversation ({error})") from None
        images = [part for message in messages for part in message.content if isinstance(part, Image)]
        slot = self.tokenizer.spec.image_token_id
        at = [i for i, token_id in enumerate(ids) if token_id == slot]
        if (slots := len(at)) != len(images) * self.image.tokens:
            raise UserError(
                f"the prompt has {slots} image tokens for {len(images)} images of {self.image.tokens}; "
                "put images in user messages only"
            )
        prepared = tuple(
            PreparedImage(
                image.digest, None if image.digest in at_hand else to_pixels(to_pillow(image), self.image), start
            )
            for image, start in zip(images, at[:: self.image.tokens], strict=True)
        )
        if self.latents == "prefill":
            ids += self.tokenizer.spec.latent_token_ids
        return Prompt(tuple(ids), prepared)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the embedding of the prompt's `image`-th image."""

    image: int
    rows: slice


def visible(prompt: Prompt, tokens_per_image: int, start: int, stop: int | None) -> Iterator[tuple[slice, Rows]]:
    """Where the images show in the prompt's tokens start..stop: places counted from `start`, and the rows that go there."""
    end = len(prompt.ids) if stop is None else stop
    for index, image in enumerate(prompt.images):
        first, last = max(image.start, start), min(image.start + tokens_per_image, end)
        if first < last:
            yield slice(first - start, last - start), Rows(index, slice(first - image.start, last - image.start))


def open_artifact(root: Path, manifest: Manifest | None = None, latents: Latents = "emit") -> Source:
    """Read the manifest (unless given), hash every file, open the tokenizer.

    Raises:
        ArtifactError: names what is missing, damaged or altered. MissingPiece: `tokenizers` is not installed.
    """
    manifest = manifest or read_manifest(root)
    check_files(root, manifest)
    try:
        image, spec = ImageSpec.from_json(manifest.image), ChatSpec.from_json(manifest.chat)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{root / NAME}: image or chat section is damaged ({error}); export again") from None
    if missing := sorted({"vocab_size", "context_length"} - set(manifest.model)):
        raise ArtifactError(f"{root / NAME}: model section lacks {missing[0]!r}; export again")
    return Source(
        root=root,
        image=image,
        tokenizer=_tokenizer(manifest.path_of(root, "tokenizer"), spec, image.tokens),
        model=manifest.model,
        precision=_precision(manifest.precision),
        artifact_bytes=sum(entry.bytes for entry in manifest.files if entry.role in RUN_ROLES),
        weights_sha256=manifest.source.get("student_sha256"),
        manifest=manifest,
        latents=latents,
    )


def _tokenizer(path: Path, spec: ChatSpec, tokens_per_image: int) -> ChatTokenizer:
    need_package("tokenizers", "tokenizer")
    need_package("jinja2", "tokenizer")
    try:
        return ChatTokenizer(path, spec, tokens_per_image)
    except Exception as error:  # the library raises bare Exception for a broken file
        raise ArtifactError(f"{path} cannot be read as a tokenizer ({error}); export again") from None


def _precision(sections: dict[str, Any]) -> str:
    """Short name for tables: the decoder's type, or all types in use."""
    types = {
        name: str(value.get("type", "?") if isinstance(value, dict) else value) for name, value in sections.items()
    }
    for name in ("decoder", "text", "text_gguf"):
        if name in types:
            return types[name]
    return "+".join(dict.fromkeys(types.values())) or "unknown"


def need_package(name: str, extra: str) -> None:
    """Import a package of an optional extra.

    Raises:
        MissingPiece: with the pip command.
    """
    import importlib

    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # a native library may be there and not load
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingPiece(f"{name} cannot be used here ({cause}); run `pip install 'align-edge[{extra}]'`") from None
