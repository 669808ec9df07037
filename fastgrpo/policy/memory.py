"""Activation memory of the update, by formula: the bytes that the packed forward keeps for its backward.

Counted: what autograd saves in the layers as transformers writes them (RMSNorm in fp32 whatever the dtype, every
product apart, `shared_prefix_attention`'s q, k, v, output and log-sum-exp), the rotary table, the final norm, and the
scored rows that the LM head reads; and, for the peak, what the backward adds before it frees. All weights train, or
LoRA adapters alone. Not counted: weights, gradients, the optimizer, the head's own buffers, the inside of an attention
kernel, and layers fused by a compiler. docs/update.md has the formulas written out; tests hold them against the tensors
that autograd saves and against the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_FLOAT, _INDEX = 4, 8  # bytes of fp32 and int64, which do not follow the model's dtype


@dataclass(frozen=True, slots=True)
class _Family:
    """Where a decoder differs from Llama's.

    fuses:      its layers run as `fastgrpo.layers` has them, where that is asked for.
    qk_norms:   a norm of queries and keys, by "head" or over the "row" of all heads.
    fused_qkv:  values are a view of one projection of q, k and v, which so is kept whole beside the rotated q and k.
    late_norms: norms come after attention and MLP, multiply their weight in fp32, as the rotary table is.
    """

    fuses: bool = False
    qk_norms: str | None = None
    fused_qkv: bool = False
    late_norms: bool = False


_LLAMA = _Family(fuses=True)
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _Family(),
    "qwen3": _Family(fuses=True, qk_norms="head"),
    "phi3": _Family(fused_qkv=True),
    "olmo2": _Family(qk_norms="row", late_norms=True),
}

_FUSING = [name for name, family in _FAMILIES.items() if family.fuses]

# The linear layers of a decoder layer, those that read the same tensor together.
_LINEARS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_FUSED_LINEARS = (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",))

# What these save for the backward is their input, beside their output, which the product with `up` saves.
_SILU = {"silu", "swish"}  # alone they are fused with the product
_ACTIVATIONS = _SILU | {"gelu", "gelu_new", "gelu_pytorch_tanh"}

# Dropout keeps a mask and a second copy, in training alone.
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True, slots=True)
class Adapters:
    """LoRA in fp32, as PEFT makes it whatever the model's dtype, without dropout; all other weights are frozen.

    rank: r. targets: names of the adapted linear layers, such as "q_proj"; None = all but the LM head.
    """

    rank: int
    targets: frozenset[str] | None = None

    def among(self, names: tuple[str, ...]) -> int:
        """How many of these layers are adapted."""
        return len(names) if self.targets is None else sum(name in self.targets for name in names)


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """Bytes per packed token, except `scored_row`.

    layer:      what a decoder layer keeps.
    checkpoint: what a checkpointed layer keeps, its input.
    recomputed: what a checkpointed layer keeps besides, once the backward has run its forward again.
    outside:    ids, positions, rotary table and final norm, whatever the number of layers.
    mlp:        what the backward of the last layer's MLP adds, less the final norm, which is done by then.
    norm:       what the backward of the final norm adds.
    forward:    the most that a forward without gradients has at once.
    unneeded:   what the first layer does not keep, where no layer is checkpointed: with frozen embeddings, its norm.
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
    forward: int = 0
    unneeded: int = 0

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
        body -= 0 if checkpoint_every else self.unneeded
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


def activation_memory(
    config: Any, *, dtype: torch.dtype, adapters: Adapters | None = None, on_cpu: bool = False, fused: bool = False
) -> ActivationMemory:
    """The formula's numbers for a model of the transformers config `config`, run in `dtype`.

    adapters: what trains in place of all weights. on_cpu: where sums of two dtypes, as adapters make, copy a summand.
    fused: with `fused_layers`, for configs that `can_fuse` names.
    Dense decoders only: llama, mistral, qwen2, qwen3, smollm3, granite, phi3, olmo2; float32, bfloat16, float16.
    Raises ValueError with the reason for every other model, activation, dropout or dtype: nothing is guessed.
    """
    config = config.get_text_config()
    family = _family(config, dtype)
    if fused and not family.fuses:
        raise ValueError(f"fused layers are known for {', '.join(_FUSING)}; those of {config.model_type!r} are not")
    e, hidden, inner = dtype.itemsize, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    q, k = heads * head_dim, (config.num_key_value_heads or heads) * head_dim
    # A norm keeps its input in fp32, 1 / rms per row, and, for its weight's gradient, what the weight multiplies; fused
    # its input as it is.
    normed = 0 if adapters else _FLOAT if family.late_norms else e

    def norm(width: int, rows: int = 1) -> int:
        return (_FLOAT + normed) * width + _FLOAT * rows

    def layer_norm(width: int, rows: int = 1) -> int:
        return e * width if fused else norm(width, rows)

    rows = (heads, k // head_dim) if family.qk_norms == "head" else (1, 1)
    qk_norms = (layer_norm(q, rows[0]), layer_norm(k, rows[1])) if family.qk_norms else (0, 0)
    attention = e * 2 * (q + k) + _FLOAT * heads + sum(qk_norms) + e * (q + k) * family.fused_qkv
    mlp = e * (2 if fused and config.hidden_act in _SILU else 3) * inner  # gate, its activation, up
    layer = 2 * layer_norm(hidden) + attention + mlp + _inputs(family, e, hidden, q, inner, adapters)
    rotary_dim = int(head_dim * ((getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1))
    rotary = 2 * rotary_dim * (_FLOAT if family.late_norms else e)
    # The layer's input is one of the tensors it saves, unless a norm reads it first and has to make it fp32.
    saves_input = fused or family.late_norms or dtype == torch.float32
    moments = _Moments(family, e, hidden, inner, adapters, on_cpu, fused)
    return ActivationMemory(
        layer=layer,
        checkpoint=e * hidden,
        recomputed=layer - e * hidden * saves_input,
        outside=2 * _INDEX + rotary + norm(hidden),
        mlp=moments.backward() - norm(hidden),
        norm=5 * _FLOAT * hidden,  # written in plain operations, each with its own result
        scored_row=e * hidden + _INDEX,
        num_layers=config.num_hidden_layers,
        forward=moments.forward(q, k) + 2 * _INDEX + rotary,
        unneeded=_unneeded(adapters, 0 if family.late_norms else layer_norm(hidden), qk_norms, fused),
    )


def can_fuse(config: Any) -> bool:
    """Are layers of this transformers config known to run fused? Of others `fused_layers` asks the model itself."""
    return config.get_text_config().model_type in _FUSING


def _inputs(family: _Family, e: int, hidden: int, q: int, inner: int, adapters: Adapters | None) -> int:
    """What the linear layers read and so keep, the output of attention apart, which it keeps itself."""
    reads = (hidden, q, hidden, inner)
    if adapters is None:
        return e * (2 * hidden + inner)
    kept = 0
    for names, width in zip(_FUSED_LINEARS if family.fused_qkv else _LINEARS, reads, strict=True):
        adapted = adapters.among(names)
        # An adapter reads its own fp32 copy where the model is not fp32; its two factors have r numbers between them.
        copies = adapted * width if e != _FLOAT else 0 if names == ("o_proj",) else bool(adapted) * width
        kept += _FLOAT * (copies + adapted * adapters.rank)
    return kept


def _unneeded(adapters: Adapters | None, norm: int, qk_norms: tuple[int, int], fused: bool) -> int:
    """What norms of the first layer would keep for a gradient of frozen embeddings, which nobody wants."""
    if adapters is None:
        return 0
    adapted = [adapters.among((name,)) for name in ("q_proj", "k_proj")]
    if fused:  # one op for both
        adapted = [sum(adapted)] * 2
    return norm + sum(n for n, some in zip(qk_norms, adapted, strict=True) if not some)


@dataclass(frozen=True, slots=True)
class _Moments:
    """Temporary tensors of the MLP, where a layer has most of them: bytes per token."""

    family: _Family
    e: int
    hidden: int
    inner: int
    adapters: Adapters | None
    on_cpu: bool
    fused: bool

    @property
    def _sum(self) -> int:
        """What an adapter of the last product before the activation's has beside the layer's own output."""
        _, _, names, _ = _FUSED_LINEARS if self.family.fused_qkv else _LINEARS
        return self._added(names, self.inner * (1 + self.family.fused_qkv))

    def _added(self, names: tuple[str, ...], width: int) -> int:
        """What an adapter of one of these has when it is done: the scaled output; the sum; its summand in fp32."""
        if self.adapters is None or not self.adapters.among(names):
            return 0
        return _FLOAT * width * (2 + (self.on_cpu and self.e != _FLOAT))

    def forward(self, q: int, k: int) -> int:
        """Of a forward without gradients, where results are dropped when they have been read, at most."""
        e, hidden, inner = self.e, self.hidden, self.inner
        residuals = e * (3 if self.family.late_norms else 4) * hidden
        norm = e * 2 * hidden + 2 * _FLOAT * hidden
        rotation = e * (3 * hidden + 4 * q + 2 * k)
        product = e * (4 if self.family.fused_qkv else 3) * inner
        if self.fused:
            norm, rotation = 0, e * (3 * hidden + 2 * q + 3 * k)
        adapted = e * 2 * inner + self._sum + _FLOAT * hidden * (e != _FLOAT) if self._sum else 0
        gated = 2 if self.family.fused_qkv else 0  # gate and up, until the last product is done
        last = e * ((1 + gated) * inner + hidden)
        if added := self._added(("down_proj",), hidden):
            last += added + _FLOAT * inner * (e != _FLOAT)
        return max(norm, rotation, residuals + max(product, adapted, last))

    def backward(self) -> int:
        """Of the last layer, beyond what is kept: in its backward, or with adapters where its forward ends."""
        e, hidden, inner = self.e, self.hidden, self.inner
        # Gradients of the product and of both factors, where the product itself is done with; and of the residual.
        if self.adapters is None:
            return e * (2 * inner + hidden)
        down = bool(self.adapters.among(("down_proj",)))
        if e == _FLOAT:
            return e * ((3 - down) * inner + hidden * (1 + self.family.fused_qkv))
        later = _FLOAT * inner * down + e * inner * self.family.fused_qkv  # kept in the end, but not there yet
        return max((_FLOAT if down else 3 * e) * inner, self._sum - later) + 12 * hidden


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
