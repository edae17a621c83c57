"""Export-only modules over the weights of a loaded student: the same mathematics in operators every target parses.

Nothing here is for training. Matrices come from `export.linear`, without values until a file is written. Norms, softmax
and rotations run in float32 whatever the weight type. Importing this module imports torch.

Shape legend: B batch, S new tokens, P cached tokens, T = P + S, H hidden, K key/value heads, G query heads per
key/value head, D head width, V vocabulary, N visual tokens, C channels, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.linear import Recipe, linear, vision_linear
from export.precision import Kind
from export.student import Student, blocks_used

MASKED = torch.finfo(torch.float32).min


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; division, because runtimes fuse Sqrt + Div and not Reciprocal."""

    def __init__(self, student: Student, source: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", student.weight(source))
        self.eps, self.dtype = float(source.variance_epsilon), dtype

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(self.dtype)


class LayerNorm(nn.Module):
    def __init__(self, student: Student, source: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", student.weight(source))
        self.register_buffer("bias", student.weight(source, "bias"))
        self.eps, self.dtype = source.eps, dtype

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(self.dtype)


class VisionBlock(nn.Module):
    """Pre-norm transformer block shared by SigLIP and CLIP."""

    def __init__(self, recipe: Recipe, source: Any) -> None:
        super().__init__()
        attention = source.self_attn
        self.heads, self.scale = attention.num_heads, attention.head_dim**-0.5
        self.norm1 = LayerNorm(recipe.student, source.layer_norm1, recipe.dtype)
        self.norm2 = LayerNorm(recipe.student, source.layer_norm2, recipe.dtype)
        self.q, self.k, self.v = (vision_linear(recipe, getattr(attention, f"{n}_proj")) for n in "qkv")
        self.o = vision_linear(recipe, attention.out_proj, out=True)
        self.fc1, self.fc2 = vision_linear(recipe, source.mlp.fc1), vision_linear(recipe, source.mlp.fc2, out=True)
        self.activation = source.mlp.activation_fn

    def forward(self, x_BNH: Tensor) -> Tensor:
        batch, tokens, hidden = x_BNH.shape
        y = self.norm1(x_BNH)

        def split(z: Tensor) -> Tensor:
            return z.reshape(batch, tokens, self.heads, hidden // self.heads).transpose(1, 2)

        scores = torch.matmul(split(self.q(y) * self.scale), split(self.k(y)).transpose(2, 3))
        weights = torch.softmax(scores.float(), dim=-1).to(y.dtype)
        mixed = torch.matmul(weights, split(self.v(y))).transpose(1, 2).reshape(batch, tokens, hidden)
        x_BNH = x_BNH + self.o(mixed)
        return x_BNH + self.fc2(self.activation(self.fc1(self.norm2(x_BNH))))


class VisionEncoder(nn.Module):
    """pixel_values [B,C,size,size] -> image_features [B,N,H]: tower, feature selection and projector."""

    def __init__(self, recipe: Recipe, features: torch.dtype = torch.float32) -> None:
        super().__init__()
        student, dtype = recipe.student, recipe.dtype
        tower, projector = student.model.model.vision_tower, student.model.model.multi_modal_projector
        embeddings = tower.embeddings
        self.dtype, self.stream, self.features = dtype, recipe.stream, features
        self.patch = embeddings.patch_size
        conv = embeddings.patch_embedding
        # ONNX has no bfloat16 convolution before opset 22
        pixels = torch.float32 if dtype == torch.bfloat16 else dtype
        self.register_buffer("kernel", conv.weight.detach().to(pixels))
        self.register_buffer("kernel_bias", None if conv.bias is None else conv.bias.detach().to(pixels))
        self.register_buffer("positions", embeddings.position_embedding.weight.detach().to(dtype))
        is_clip = student.facts.tower == "clip"
        self.register_buffer("cls", embeddings.class_embedding.detach().to(dtype) if is_clip else None)
        self.pre_norm = LayerNorm(student, tower.pre_layrnorm, dtype) if is_clip else nn.Identity()
        self.taps = blocks_used(student.facts, len(tower.encoder.layers))
        self.blocks = nn.ModuleList(VisionBlock(recipe, b) for b in tower.encoder.layers[: max(self.taps)])
        self.skip = 1 if student.facts.select == "default" else 0
        self.linear_1 = vision_linear(recipe, projector.linear_1, out=True)
        self.linear_2 = vision_linear(recipe, projector.linear_2, out=True)
        self.activation = projector.act

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(self.kernel.dtype)
        x = functional.conv2d(pixels, self.kernel, self.kernel_bias, stride=self.patch).flatten(2).transpose(1, 2)
        x = x.to(self.dtype)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
        x = self.pre_norm(x + self.positions).to(self.stream)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        chosen = [states[tap][:, self.skip :] for tap in self.taps]
        features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        return self.linear_2(self.activation(self.linear_1(features))).to(self.features)


class DecoderLayer(nn.Module):
    """Grouped-query attention without repeating keys: the G queries of a head share one batched product."""

    def __init__(self, recipe: Recipe, source: Any) -> None:
        super().__init__()
        student, dtype = recipe.student, recipe.dtype
        facts, attention = student.facts, source.self_attn
        self.kv_heads, self.head_dim = facts.kv_heads, facts.head_dim
        self.groups, self.scale = facts.heads // facts.kv_heads, facts.head_dim**-0.5
        self.norm1 = RMSNorm(student, source.input_layernorm, dtype)
        self.norm2 = RMSNorm(student, source.post_attention_layernorm, dtype)
        self.q, self.k, self.v = (linear(recipe, getattr(attention, f"{n}_proj")) for n in "qkv")
        has_norm = facts.decoder == "qwen3"
        self.q_norm = RMSNorm(student, attention.q_norm, dtype) if has_norm else nn.Identity()
        self.k_norm = RMSNorm(student, attention.k_norm, dtype) if has_norm else nn.Identity()
        self.o = linear(recipe, attention.o_proj, out=True)
        self.gate, self.up = (linear(recipe, getattr(source.mlp, f"{n}_proj")) for n in ("gate", "up"))
        self.down = linear(recipe, source.mlp.down_proj, out=True)
        self.activation = source.mlp.act_fn

    def forward(
        self, x_BSH: Tensor, cos: Tensor, sin: Tensor, bias_B11ST: Tensor, past_k_BKPD: Tensor, past_v_BKPD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns hidden state, the new keys and values [B,K,S,D], and all of them [B,K,T,D]."""
        batch, new, _ = x_BSH.shape
        y = self.norm1(x_BSH)
        q = self.q_norm(self.q(y).reshape(batch, new, self.kv_heads * self.groups, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(y).reshape(batch, new, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(y).reshape(batch, new, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin) * self.scale, _rotate(k, cos, sin)
        keys, values = torch.cat([past_k_BKPD, k], dim=2), torch.cat([past_v_BKPD, v], dim=2)
        grouped = q.reshape(batch, self.kv_heads, self.groups * new, self.head_dim)
        scores = torch.matmul(grouped, keys.transpose(2, 3)).reshape(batch, self.kv_heads, self.groups, new, -1)
        weights = torch.softmax(scores.float() + bias_B11ST, dim=-1).to(y.dtype)
        mixed = torch.matmul(weights.reshape(batch, self.kv_heads, self.groups * new, -1), values)
        heads = mixed.reshape(batch, self.kv_heads * self.groups, new, self.head_dim).transpose(1, 2)
        x_BSH = x_BSH + self.o(heads.reshape(batch, new, -1))
        z = self.norm2(x_BSH)
        product = self.activation(self.gate(z)).to(x_BSH.dtype) * self.up(z).to(x_BSH.dtype)
        return x_BSH + self.down(product), k, v, keys, values


def _rotate(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x_BHSD.float()
    half = wide.shape[-1] // 2
    turned = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
    return (wide * cos + turned * sin).to(x_BHSD.dtype)


class Decoder(nn.Module):
    """The parts both cache layouts share."""

    def __init__(self, recipe: Recipe, head: Kind | None = None) -> None:
        super().__init__()
        student = recipe.student
        language = student.model.model.language_model
        self.stream = recipe.stream
        self.layers = nn.ModuleList(DecoderLayer(recipe, layer) for layer in language.layers)
        self.norm = RMSNorm(student, language.norm, recipe.dtype)
        self.head = linear(recipe.with_kind(head or recipe.kind), student.model.lm_head)
        self.register_buffer("inv_freq", language.rotary_emb.inv_freq.detach().float())
        self.rope_scale = float(language.rotary_emb.attention_scaling)

    def angles(self, position_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B,1,S,D] for positions counted from 0."""
        freqs = position_ids_BS[:, None, :, None].float() * self.inv_freq
        both = torch.cat([freqs, freqs], dim=-1)
        return both.cos() * self.rope_scale, both.sin() * self.rope_scale


class MergedDecoder(Decoder):
    """Prefill and decode in one graph, cache [B,K,P,D] as transformers.js and ONNX Runtime users expect it."""

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        num_logits_to_keep: Tensor,
        past_key_values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        new, past = inputs_embeds.shape[1], past_key_values[0].shape[2]
        key_T = torch.arange(past + new)
        causal_ST = key_T[None, :] <= (torch.arange(new) + past)[:, None]
        allowed = causal_ST[None, None, None] & (attention_mask > 0)[:, None, None, None, :]
        # the smallest finite number instead of -inf: a fully masked (padding) row must not become NaN
        bias = torch.where(allowed, 0.0, MASKED)
        cos, sin = self.angles(position_ids)
        x, cache = inputs_embeds.to(self.stream), []
        for i, layer in enumerate(self.layers):
            x, _, _, keys, values = layer(x, cos, sin, bias, past_key_values[2 * i], past_key_values[2 * i + 1])
            cache += [keys, values]
        return (self.head(last_rows(self.norm(x), num_logits_to_keep)).float(), *cache)


def last_rows(x_BSH: Tensor, count: Tensor) -> Tensor:
    """x[:, -count:], where count 0 keeps all rows; one ONNX Slice, because torch would specialise on the value."""
    start = -count.reshape(1)
    end, axis = torch.tensor([2**63 - 1]), torch.tensor([1])
    return torch.onnx.ops.symbolic("Slice", (x_BSH, start, end, axis), dtype=x_BSH.dtype, shape=x_BSH.shape, version=18)


class DeltaDecoder(Decoder):
    """Cache [1,P,K,D] in, only the new rows [1,S,K,D] out: the caller appends them in place.

    attention_bias [1,1,S,T] is 0 where a query may look and the smallest finite number elsewhere. Beside the logits of
    the last token comes the likeliest token itself, so that greedy decoding need not fetch a vocabulary of logits.
    """

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, attention_bias: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cos, sin = self.angles(position_ids)
        bias = attention_bias[:, None].float()
        x, rows = inputs_embeds.to(self.stream), []
        for i, layer in enumerate(self.layers):
            past_k, past_v = past[2 * i].transpose(1, 2), past[2 * i + 1].transpose(1, 2)
            x, k, v, _, _ = layer(x, cos, sin, bias, past_k, past_v)
            rows += [k.transpose(1, 2), v.transpose(1, 2)]
        logits_11V = self.head(self.norm(x[:, -1:])).float()
        return (logits_11V, logits_11V.argmax(dim=-1), *rows)
