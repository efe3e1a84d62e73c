"""Hugging Face's Llama, forward, for training on a CPU: the same function in bfloat16 with fewer copies.

``transformers`` under autocast spends more time on converting and multiplying element by element than on
matrix products when a model is this small. Here every weight is converted once and activations stay in
bfloat16; gradients reach the model's own float32 parameters. Rows start at position 0 and are padded on the
right, so the causal mask alone suffices: nothing looks at padding except padding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_states(trunk: Any, ids: Tensor) -> Tensor:
    """Return the last hidden states [B, L, H] in bfloat16.

    :param trunk: a ``LlamaModel`` without biases
    :param ids: piece ids [B, L]
    """
    config = trunk.config
    rows, length = ids.shape
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    dim, eps = config.hidden_size // heads, config.rms_norm_eps
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(length), torch.cat([frequencies, frequencies]))  # [L, D]
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    sin = torch.cat([-sin[:, : dim // 2], sin[:, dim // 2 :]], dim=-1)
    mask = torch.full((length, length), float("-inf"), dtype=torch.bfloat16).triu(1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.bfloat16(), eps)

    x = F.embedding(ids, trunk.embed_tokens.weight).bfloat16()  # [B, L, H]
    for layer in trunk.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).bfloat16()
        mixed = F.linear(norm(x, layer.input_layernorm.weight), qkv)
        mixed = mixed.view(rows, length, heads + 2 * key_heads, dim).transpose(1, 2)  # [B, heads, L, D]
        turned = mixed[:, : heads + key_heads]
        turned = turned * cos + turned.roll(dim // 2, dims=-1) * sin
        query = turned[:, :heads] * dim**-0.5
        key = turned[:, heads:].repeat_interleave(heads // key_heads, dim=1)
        value = mixed[:, heads + key_heads :].repeat_interleave(heads // key_heads, dim=1)
        weights = (query @ key.transpose(2, 3) + mask).softmax(-1)  # [B, heads, L, L]
        attended = (weights @ value).transpose(1, 2).reshape(rows, length, -1)
        x = x + F.linear(attended, attention.o_proj.weight.bfloat16())
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).bfloat16()
        gate, up = F.linear(norm(x, layer.post_attention_layernorm.weight), gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, mlp.down_proj.weight.bfloat16())
    return norm(x, trunk.norm.weight)
