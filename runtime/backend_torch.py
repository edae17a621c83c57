"""PyTorch: a LLaVA checkpoint as Hugging Face loads it, float32, with caches of our own choice and no `generate()`.

Shape legend: N = images, C = 3, S = image side, T = visual tokens, L = prompt length, D = hidden, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.api import Logits, Message, PreparedImage, Prompt
from runtime.options import LoadOptions
from runtime.source import Source, need_package, visible
from runtime.torch_decoder import make_decoder
from vlm import preprocess
from vlm.errors import CheckpointError, MissingPiece
from vlm.load import Checkpoint, load_model, open_checkpoint


class TorchBackend:
    """Reference for every other backend: same checkpoint, no conversion."""

    def __init__(self, source: Source, checkpoint: Checkpoint, options: LoadOptions) -> None:
        import torch

        if options.device == "cuda" and not torch.cuda.is_available():
            raise MissingPiece("this PyTorch sees no CUDA device; run with `--device cpu`")
        torch.set_num_threads(options.threads)
        self._torch = torch
        self._source = source
        self._device = torch.device(options.device)
        self._model = load_model(checkpoint).to(self._device).requires_grad_(False)
        self.info = source.info("torch", options)
        self._decoder: Any = make_decoder(torch, self._model, self.info.context_length)

    def prepare(self, messages: Sequence[Message], at_hand: Container[str] = frozenset()) -> Prompt:
        return self._source.prompt(messages, preprocess.pixels, at_hand)

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        with self._torch.inference_mode():
            pixels_NCSS = self._torch.from_numpy(np.stack([image.pixels for image in images]))
            features = self._model.get_image_features(pixel_values=pixels_NCSS.to(self._device)).pooler_output
        return [embeds_TD.clone() for embeds_TD in features]  # each may be kept without the others

    def prefill(self, prompt: Prompt, embeds: Sequence[Any], start: int = 0, stop: int | None = None) -> Logits:
        with self._torch.inference_mode():
            ids_1L = self._torch.tensor([prompt.ids[start:stop]], device=self._device)
            embeds_1LD = self._model.get_input_embeddings()(ids_1L)
            for place, rows in visible(prompt, self.info.tokens_per_image, start, stop):
                embeds_1LD[0, place] = embeds[rows.image][rows.rows]
            return self._host(self._decoder.append(embeds_1LD, start))

    def step(self, token_id: int) -> Logits:
        with self._torch.inference_mode():
            return self._host(self._decoder.step(token_id))

    def answer_batch(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[list[int]]:
        """Greedy tokens of several prompts at once; see `runtime.batch`."""
        from runtime.torch_batch import greedy

        embeds = [self.encode(prompt.images) if prompt.images else [] for prompt in prompts]
        with self._torch.inference_mode():
            return greedy(self._torch, self._model, prompts, embeds, limits, self.info.eos_token_ids)

    def _host(self, logits_V: Any) -> Logits:
        logits: Logits = logits_V.cpu().numpy()
        return logits

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._source.tokenizer.decode(ids)

    def pieces(self) -> Mapping[int, str | bytes] | None:
        return self._source.pieces

    def sync(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self._model = self._decoder = None


def open_torch(root: Path, options: LoadOptions) -> TorchBackend:
    """Checkpoint directory -> backend.

    Raises:
        CheckpointError: not a LLaVA checkpoint. MissingPiece: torch or transformers is not installed, or no GPU.
    """
    for package in ("tokenizers", "jinja2", "safetensors", "torch", "transformers"):
        need_package(package, "torch")
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of its own would interleave with ours
    checkpoint = open_checkpoint(root)
    source = Source(
        root=root,
        image=checkpoint.image,
        tokenizer=checkpoint.tokenizer,
        model=_numbers(checkpoint),
        precision="float32",
        artifact_bytes=sum(path.stat().st_size for path in (*checkpoint.weights, root / "tokenizer.json")),
        weights_sha256=checkpoint.weights_sha256(),
        latents=options.latents,
    )
    return TorchBackend(source, checkpoint, options)


def _numbers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes for the profiler, from the configuration and the tensor shapes (no weights are read)."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True).get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    decoder = 0
    for path in checkpoint.weights:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if "language_model" in name and "embed_tokens" not in name and "lm_head" not in name:
                        decoder += int(np.prod(tensors.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None
    head = text.vocab_size * text.hidden_size
    return {
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "decoder_weight_bytes": 4 * (decoder + head),
        "lm_head_bytes": 4 * head,
        "kv_bytes_per_token": 4 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim,
    }
