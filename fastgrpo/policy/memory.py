"""Activation memory of the update, by formula: the bytes that the packed forward keeps for its backward.

Counted: what autograd saves in the layers as transformers writes them (RMSNorm in fp32 whatever the dtype, every
product apart, `shared_prefix_attention`'s q, k, v, output and log-sum-exp), the rotary table, the final norm, and the
scored rows that the LM head reads; and, for the peak, what the backward adds before it frees. All weights train. Not
counted: weights, gradients, the optimizer, the head's own buffers, the inside of an attention kernel, adapters, and
layers fused by a compiler. docs/update.md has the formulas written out; tests hold them against the tensors that
autograd saves and against the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_FLOAT, _INDEX = 4, 8  # bytes of fp32 and int64, which do not follow the model's dtype


@dataclass(frozen=True, slots=True)
class _Family:
    """Where a decoder differs from Llama's.

    qk_norms:   a norm of queries and keys, by "head" or over the "row" of all heads.
    fused_qkv:  values are a view of one projection of q, k and v, which so is kept whole beside the rotated q and k.
    late_norms: norms come after attention and MLP, multiply their weight in fp32, as the rotary table is.
    """

    qk_norms: str | None = None
    fused_qkv: bool = False
    late_norms: bool = False


_LLAMA = _Family()
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen3": _Family(qk_norms="head"),
    "phi3": _Family(fused_qkv=True),
    "olmo2": _Family(qk_norms="row", late_norms=True),
}

# What these save for the backward is their input, beside their output, which the product with `up` saves.
_ACTIVATIONS = {"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh"}

# Dropout keeps a mask and a second copy, in training alone.
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """Bytes per packed token, except `scored_row`.

    layer:      what a decoder layer keeps.
    checkpoint: what a checkpointed layer keeps, its input.
    recomputed: what a checkpointed layer keeps besides, once the backward has run its forward again.
    outside:    ids, positions, rotary table and final norm, whatever the number of layers.
    mlp:        what the backward of the last layer's MLP adds, less the final norm, which is done by then.
    norm:       what the backward of the final norm adds.
    scored_row: bytes per scored token: the hidden state the LM head reads, later its gradient, and the row's index.
    num_layers: decoder layers.
    """

    layer: int
    checkpoint: int
    recomputed: int
    outside: int
    mlp: int
    norm: int
    scored_row: int
    num_layers: int

    def kept(self, num_tokens: int, *, num_scored: int | None = None, checkpoint_every: int = 0) -> int:
        """Bytes alive between the forward and the backward of a micro-batch.

        num_tokens: T, packed tokens. num_scored: N <= T, those that predict a completion's token; None = T.
        checkpoint_every: 0 = no layer is checkpointed, 1 = all, k = layers 0, k, 2k, ...
        Raises ValueError for numbers out of range.
        """
        scored = num_tokens if num_scored is None else num_scored
        if not 0 <= scored <= num_tokens:
            raise ValueError(f"num_scored must be from 0 to num_tokens = {num_tokens}, got {num_scored}")
        if checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be 0 (never) or positive, got {checkpoint_every}")
        checkpointed = -(-self.num_layers // checkpoint_every) if checkpoint_every else 0
        body = checkpointed * self.checkpoint + (self.num_layers - checkpointed) * self.layer + self.outside
        return num_tokens * body + scored * self.scored_row

    def peak(self, num_tokens: int, *, num_scored: int | None = None, checkpoint_every: int = 0) -> int:
        """The most alive at once in the backward, at most: arguments and errors as of `kept`.

        That is in the final norm, while all is kept; or in the MLP of the last layer, or of the last checkpointed one,
        which is kept whole again by then: those behind it are gone, of those before it nothing is recomputed yet.
        """
        kept = self.kept(num_tokens, num_scored=num_scored, checkpoint_every=checkpoint_every)
        grown = 0
        if checkpoint_every:
            behind = (self.num_layers - 1) % checkpoint_every
            grown = max(0, self.recomputed - behind * self.layer)
        return kept + num_tokens * max(self.norm, grown + self.mlp)


def activation_memory(config: Any, *, dtype: torch.dtype) -> ActivationMemory:
    """The formula's numbers for a model of the transformers config `config`, run in `dtype`.

    Dense decoders only: llama, mistral, qwen2, qwen3, smollm3, granite, phi3, olmo2; float32, bfloat16, float16.
    Raises ValueError with the reason for every other model, activation, dropout or dtype: nothing is guessed.
    """
    config = config.get_text_config()
    family = _family(config, dtype)
    e, hidden, heads = dtype.itemsize, config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    q, k = heads * head_dim, (config.num_key_value_heads or heads) * head_dim
    # A norm keeps its input in fp32, 1 / rms per row, and, for its weight's gradient, what the weight multiplies.
    normed = _FLOAT if family.late_norms else e

    def norm(width: int, rows: int = 1) -> int:
        return (_FLOAT + normed) * width + _FLOAT * rows

    attention = e * 2 * (q + k) + _FLOAT * heads
    if family.fused_qkv:
        attention += e * (q + k)
    if family.qk_norms == "head":
        attention += norm(q, heads) + norm(k, k // head_dim)
    elif family.qk_norms == "row":
        attention += norm(q) + norm(k)
    mlp = e * 4 * config.intermediate_size  # gate, its activation, up, their product
    projected = e * 2 * hidden  # what q, k, v read, what gate and up read
    layer = 2 * norm(hidden) + projected + attention + mlp
    rotary_dim = int(head_dim * ((getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1))
    rotary = 2 * rotary_dim * (_FLOAT if family.late_norms else e)
    # The layer's input is one of the tensors it saves, unless a norm reads it first and has to make it fp32.
    saves_input = family.late_norms or dtype == torch.float32
    return ActivationMemory(
        layer=layer,
        checkpoint=e * hidden,
        recomputed=layer - e * hidden * saves_input,
        outside=2 * _INDEX + rotary + norm(hidden),
        # Gradients of the product and of both factors, where the product itself is done with; and of the residual.
        mlp=e * (2 * config.intermediate_size + hidden) - norm(hidden),
        norm=5 * _FLOAT * hidden,  # written in plain operations, each with its own result
        scored_row=e * hidden + _INDEX,
        num_layers=config.num_hidden_layers,
    )


def _family(config: Any, dtype: torch.dtype) -> _Family:
    """The model's family, once nothing of it is unknown."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"activation memory is known for float32, bfloat16 and float16, not for {dtype}")
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"activation memory is known for {', '.join(_FAMILIES)}; what layers of {config.model_type!r} keep is not"
        )
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"activation memory is known for {', '.join(sorted(_ACTIVATIONS))}; what {config.hidden_act!r} keeps is not"
        )
    if dropout := next((name for name in _DROPOUTS if getattr(config, name, None)), None):
        raise ValueError(f"activation memory is known without dropout, got {dropout}={getattr(config, dropout)}")
    return _FAMILIES[config.model_type]
