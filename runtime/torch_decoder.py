"""The decoder of a PyTorch checkpoint and its keys and values: growing on a processor, of fixed size on a GPU.

On a GPU a small decoder waits for the processor that launches its kernels. With a cache of fixed size every step is the same
work on the same addresses, so it is captured once as a CUDA graph and replayed with one call.
Shape legend: L = new tokens, D = hidden, V = vocabulary, R = room (most tokens of the context).
"""

from __future__ import annotations

from typing import Any, Protocol

WARM_STEPS = 3  # libraries choose their kernels in the first runs; what is captured stays


class Decoder(Protocol):
    """Takes tensors on the model's device; to be called in inference mode."""

    def append(self, embeds_1LD: Any, start: int) -> Any:
        """Forget the context from token `start` on, take in L more; logits_V after the last."""
        ...

    def step(self, token_id: int) -> Any:
        """Append one token; logits_V of the next."""
        ...


class GrowingCache:
    """Transformers' DynamicCache: no room is taken before it is needed."""

    def __init__(self, torch: Any, model: Any) -> None:
        self._torch, self._model = torch, model
        self._cache: Any = None

    def append(self, embeds_1LD: Any, start: int) -> Any:
        from transformers import DynamicCache

        if start == 0:
            self._cache = DynamicCache(config=self._model.config.get_text_config())
        elif (extra := self._cache.get_seq_length() - start) > 0:
            self._cache.crop(-extra)
        return self._run(embeds_1LD)

    def step(self, token_id: int) -> Any:
        embed = self._model.get_input_embeddings()
        return self._run(embed(self._torch.tensor([[token_id]], device=embed.weight.device)))

    def _run(self, embeds_1LD: Any) -> Any:
        language = self._model.model.language_model
        hidden_1LD = language(inputs_embeds=embeds_1LD, past_key_values=self._cache, use_cache=True).last_hidden_state
        return self._model.lm_head(hidden_1LD[0, -1]).float()


class StaticCache:
    """Transformers' StaticCache of `room` tokens; steps are replayed from a CUDA graph where there is a GPU."""

    def __init__(self, torch: Any, model: Any, room: int, graph: bool) -> None:
        from transformers import StaticCache as Slots

        config = model.config.get_text_config()
        device = model.get_input_embeddings().weight.device
        self._torch, self._model = torch, model
        self._cache = Slots(config=config, max_cache_len=room)
        self._slots_R = torch.arange(room, device=device)
        self._token_11 = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._position_11 = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._logits_V: Any = None
        self._wanted = graph
        self._graph: Any = None

    def append(self, embeds_1LD: Any, start: int) -> Any:
        self._rewind(start)
        stop = start + embeds_1LD.shape[1]
        logits_V = self._run(embeds_1LD, self._slots_R[None, start:stop])
        self._position_11.fill_(stop)
        return logits_V

    def step(self, token_id: int) -> Any:
        self._token_11.fill_(token_id)
        if not self._wanted:
            return self._step()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._logits_V

    def _step(self) -> Any:
        logits_V = self._run(self._model.get_input_embeddings()(self._token_11), self._position_11)
        self._position_11.add_(1)
        return logits_V

    def _run(self, embeds_1LD: Any, positions_1L: Any) -> Any:
        # slots behind a token are empty or hold what was forgotten: the mask is all that keeps them out
        mask_11LR = (self._slots_R[None, :] <= positions_1L[0, :, None])[None, None]
        hidden_1LD = self._model.model.language_model(
            inputs_embeds=embeds_1LD,
            position_ids=positions_1L,
            attention_mask=mask_11LR,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return self._model.lm_head(hidden_1LD[0, -1]).float()

    def _rewind(self, length: int) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)
        self._position_11.fill_(length)

    def _capture(self) -> None:
        """The step as a graph; trial runs write into slots that the first real run writes again."""
        torch, length = self._torch, int(self._position_11)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_STEPS):
                self._step()
                self._rewind(length)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_V = self._step()
        self._rewind(length)  # capturing runs nothing, but the next replay must find the length of before


def make_decoder(torch: Any, model: Any, room: int) -> Decoder:
    """The cache that suits the device; windows of attention need transformers' own masks, so no fixed room there."""
    config = model.config.get_text_config()
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if model.get_input_embeddings().weight.device.type == "cuda" and not windows:
        return StaticCache(torch, model, room, graph=True)
    return GrowingCache(torch, model)
