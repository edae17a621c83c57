"""The decoder in ONNX Runtime's own operators: grouped-query attention with rotation and cache inside, fused norms.

The outside is that of `export.graph.MergedDecoder`, so every reader of that graph runs this one. The cache may also be
a shared buffer: bind a buffer of maximal length as past and present, and lengths come from the attention mask.
Importing this module imports torch.

Shape legend: B batch, S new tokens, P cached tokens, T = P + S, H hidden, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.graph import MASKED, RMSNorm, last_rows
from export.linear import Recipe, linear
from export.precision import Kind

ROTARY_POSITIONS = 32768


class SkipNorm(nn.Module):
    """RMSNorm(x + skip), and the sum: com.microsoft.SkipSimplifiedLayerNormalization."""

    def __init__(self, recipe: Recipe, source: Any) -> None:
        super().__init__()
        self.register_buffer("weight", recipe.student.weight(source).to(recipe.dtype))
        self.eps = float(source.variance_epsilon)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        normed, _, _, total = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::SkipSimplifiedLayerNormalization",
            (x, skip, self.weight),
            {"epsilon": self.eps},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, (*x.shape[:-1], 1), (*x.shape[:-1], 1), x.shape),
            version=1,
        )
        return normed, total


class FusedLayer(nn.Module):
    """Attention and feed-forward of one layer on an already normalised input."""

    def __init__(self, recipe: Recipe, source: Any) -> None:
        super().__init__()
        student, facts, attention = recipe.student, recipe.student.facts, source.self_attn
        self.heads, self.kv_heads, self.head_dim = facts.heads, facts.kv_heads, facts.head_dim
        self.qkv = linear(recipe, attention.q_proj, attention.k_proj, attention.v_proj)
        self.has_norm = facts.decoder == "qwen3"
        if self.has_norm:
            self.q_norm = RMSNorm(student, attention.q_norm, recipe.dtype)
            self.k_norm = RMSNorm(student, attention.k_norm, recipe.dtype)
        self.o = linear(recipe, attention.o_proj)
        self.norm2 = SkipNorm(recipe, source.post_attention_layernorm)
        self.gate_up, self.width = linear(recipe, source.mlp.gate_proj, source.mlp.up_proj), facts.intermediate
        self.down = linear(recipe, source.mlp.down_proj)
        self.activation = source.mlp.act_fn

    def attend(self, y: Tensor, common: tuple[Tensor, ...], past_k: Tensor, past_v: Tensor) -> list[Tensor]:
        batch, new, _ = y.shape
        last, total, cos, sin, bias = common
        query, key, value = self.qkv(y), None, None
        if self.has_norm:
            widths = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
            query, key, value = query.split(widths, dim=-1)
            query = self.q_norm(query.reshape(batch, new, self.heads, self.head_dim)).reshape(batch, new, widths[0])
            key = self.k_norm(key.reshape(batch, new, self.kv_heads, self.head_dim)).reshape(batch, new, widths[1])
        cache = (batch, self.kv_heads, past_k.shape[2] + new, self.head_dim)
        return list(
            torch.onnx.ops.symbolic_multi_out(
                "com.microsoft::GroupQueryAttention",
                (query, key, value, past_k, past_v, last, total, cos, sin, None, bias),
                {
                    "num_heads": self.heads,
                    "kv_num_heads": self.kv_heads,
                    "scale": self.head_dim**-0.5,
                    "do_rotary": 1,
                    "rotary_interleaved": 0,
                },
                dtypes=(y.dtype, y.dtype, y.dtype),
                shapes=((batch, new, self.heads * self.head_dim), cache, cache),
                version=1,
            )
        )

    def forward(
        self, y: Tensor, x: Tensor, common: tuple[Tensor, ...], past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised input and residual -> branch output, residual, cache."""
        mixed, keys, values = self.attend(y, common, past_k, past_v)
        z, x = self.norm2(self.o(mixed), x)
        gate, up = self.gate_up(z).split(self.width, dim=-1)
        return self.down(self.activation(gate) * up), x, keys, values


class FusedDecoder(nn.Module):
    """Same inputs and outputs as `MergedDecoder`."""

    def __init__(self, recipe: Recipe, head: Kind | None = None) -> None:
        super().__init__()
        student, language = recipe.student, recipe.student.model.model.language_model
        self.dtype = recipe.dtype
        self.first = RMSNorm(student, language.layers[0].input_layernorm, recipe.dtype)
        self.layers = nn.ModuleList(FusedLayer(recipe, layer) for layer in language.layers)
        following = [layer.input_layernorm for layer in language.layers[1:]]
        self.norms = nn.ModuleList(SkipNorm(recipe, norm) for norm in [*following, language.norm])
        self.head = linear(recipe.with_kind(head or recipe.kind), student.model.lm_head)
        rotary = language.rotary_emb
        positions = torch.arange(min(student.facts.context_length, ROTARY_POSITIONS)).float()
        angles = positions[:, None] * rotary.inv_freq.detach().float()
        scale = float(rotary.attention_scaling)
        self.register_buffer("cos", (angles.cos() * scale).to(recipe.dtype))
        self.register_buffer("sin", (angles.sin() * scale).to(recipe.dtype))

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        num_logits_to_keep: Tensor,
        past_key_values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        batch, new, _ = inputs_embeds.shape
        total = attention_mask.shape[1]
        # Every row counts its padding as cached tokens, which the bias hides, so all rows are equally long. The operator
        # rotates by place in the cache (its prefill ignores position_ids): distances, all that matters, are the same.
        last = torch.full((batch,), 1, dtype=torch.int32) * (total - 1)
        length = torch.scalar_tensor(total, dtype=torch.int32)
        bias = torch.where(attention_mask > 0, 0.0, MASKED if self.dtype == torch.float32 else -65504.0)
        bias = bias.to(self.dtype)[:, None, None, :].expand(batch, 1, new, total)
        common = (last.to(torch.int32), length, self.cos, self.sin, bias)
        x = inputs_embeds.to(self.dtype)
        y, cache = self.first(x), []
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            branch, x, keys, values = layer(y, x, common, past_key_values[2 * i], past_key_values[2 * i + 1])
            y, x = norm(branch, x)
            cache += [keys, values]
        return (self.head(last_rows(y, num_logits_to_keep)).float(), *cache)
