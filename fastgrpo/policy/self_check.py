"""Does a packed forward compute what the model itself computes? Asked at start-up, of every model alike.

A few tokens through the packed path are compared with the model's own logits. What a few tokens cannot show, layers
that see only part of a long sequence, is read from the config and from what attention was told.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgrpo.policy.attention import NAME, CannotShareError, Packed
from fastgrpo.policy.work import decoder_of, layer_types, layer_windows
from fastgrpo_kernels import PackedLayout

if TYPE_CHECKING:
    from fastgrpo.policy.policy import Policy

# Largest difference of the packed logits from the model's own, relative to the largest logit. The model's own attention
# takes its softmax in fp32 at best, also in a float64 model.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@torch.no_grad()
def self_check(policy: Policy, *, share_prompts: bool, longest: int | None) -> str | None:
    """Why a prompt's completions cannot share it in every layer, exactly; None when they can.

    longest: tokens of the longest sequence to come; None = the model's context.
    Raises ValueError for a model that cannot be packed at all, with the reason.
    """
    name = type(policy.causal_lm).__name__
    limit = longest or policy.context_length or sys.maxsize
    ids = torch.arange(1, 15, device=policy.device) * 7919 % policy.vocab_size
    packed = Packed(PackedLayout((5, 2, 7), ((), (), ()), policy.device), limit)
    packed.windows = []
    with policy.mode(training=False):
        try:
            logits = _packed_logits(policy, ids, packed)
        except Exception as error:
            raise ValueError(f"{name} cannot run packed sequences: {type(error).__name__}: {error}") from error
        alone = _alone(policy, ids.split([5, 2, 7]))
        if not alone.isfinite().all():
            raise ValueError(f"{name} gives logits that are not finite on its own")
        difference = _difference(logits, alone)
        if not difference <= _TOLERANCE[policy.dtype]:
            raise ValueError(
                f"{name}: packed sequences give other logits than the model's own forward (relative difference "
                f"{difference:.1e}); its attention or LM head is of a kind that is not supported"
            )
        if reason := _differs_when_long(policy.causal_lm, packed.windows, limit):
            raise ValueError(f"{name} cannot run packed sequences of up to {limit} tokens: {reason}")
    if not (difference := _training_differs(policy, ids, packed)) <= _TOLERANCE[policy.dtype]:
        raise ValueError(
            f"{name} computes something else while it trains than when it samples (relative difference "
            f"{difference:.1e}), as with dropout: ratios would be noise"
        )
    if not share_prompts:
        return "share_prompts is off"
    with policy.mode(training=True):  # as in the update
        return _why_not_share(policy, ids, limit)


def _training_differs(policy: Policy, ids: Tensor, packed: Packed) -> float:
    """By how much train() changes the model itself; adapters may have dropout, which is documented."""
    with policy.model.disable_adapter() if policy.is_peft else nullcontext():
        logits = []
        for training in (False, True):
            with policy.mode(training=training):
                logits.append(_packed_logits(policy, ids, packed))
    return _difference(logits[1], logits[0])


def _differs_when_long(causal_lm: Any, windows: list[int | None], limit: int) -> str | None:
    """How some layer treats a long sequence, or a late row, as packed attention does not; None when none does."""
    config = causal_lm.config.get_text_config()
    unknown = sorted(set(layer_types(config)) - _KNOWN_LAYERS)
    if unknown:
        return f"its layers of type {', '.join(unknown)} are not plain attention"
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in layer_types(config) and chunk and chunk < limit:
        return f"it attends in chunks of {chunk} tokens (max_prompt_length + max_completion_length may be {chunk})"
    claimed = [w for w in layer_windows(config) if w is not None and w < limit]
    if len(claimed) > sum(w is not None for w in windows):
        return f"its sliding window of {claimed[0]} tokens is in its masks alone, and attention is not told of it"
    if getattr(config, "attn_temperature_tuning", False) and 0 in getattr(config, "no_rope_layers", ()):
        return "it scales attention by a row's place in the row, not by its position (attn_temperature_tuning)"
    bounds = [bound for module in decoder_of(causal_lm).modules() for bound in _rotation_bounds(module)]
    if bounds and min(bounds) < limit:
        return (
            f"the longest sequence decides every one's rotations beyond {min(bounds)} tokens "
            f"(max_prompt_length + max_completion_length may be {min(bounds)})"
        )
    return None


def _rotation_bounds(module: torch.nn.Module) -> list[int]:
    """Lengths beyond which transformers takes other frequencies for a whole call: longrope and dynamic NTK."""
    kinds = getattr(module, "rope_type", None)
    bounds = []
    for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        if kind == "longrope":
            config: Any = module.config
            parameters = config.rope_parameters
            parameters = parameters if layer is None else parameters[layer]
            bounds.append(int(parameters["original_max_position_embeddings"]))
        elif isinstance(kind, str) and "dynamic" in kind:
            bounds.append(int(module.original_max_seq_len))  # type: ignore[arg-type]
    return bounds


def _why_not_share(policy: Policy, ids: Tensor, limit: int) -> str | None:
    completions, other, prompt = ids[:5].split([3, 2]), ids[5:9], ids[9:]
    packed = Packed(PackedLayout((5, 4), ((3, 2), ()), policy.device), limit)
    try:
        logits = _packed_logits(policy, torch.cat([prompt, other, *completions]), packed)
    except CannotShareError as error:
        return error.reason
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    first, second = (_alone(policy, [torch.cat([prompt, c])]) for c in completions)
    expected = torch.cat([first[:5], _alone(policy, [other]), first[5:], second[5:]])
    difference = _difference(logits, expected)
    if not difference <= _TOLERANCE[policy.dtype]:
        return f"other logits than the model's own forward, by {difference:.1e} of the largest"
    return None


def _packed_logits(policy: Policy, ids: Tensor, packed: Packed) -> Tensor:
    """[T, V] in fp32."""
    return policy.head.logits(policy.states(ids, packed)).float()


def _alone(policy: Policy, parts: Sequence[Tensor]) -> Tensor:
    """Logits of each sequence through the stock model, one after the other: [T, V] in fp32."""
    with _attention(policy.causal_lm, "eager"):
        return torch.cat([policy.causal_lm(input_ids=p[None], use_cache=False).logits[0] for p in parts]).float()


def _difference(packed: Tensor, alone: Tensor) -> float:
    return ((packed - alone).abs().max() / alone.abs().max().clamp(min=1.0)).item()


@contextmanager
def _attention(causal_lm: Any, name: str) -> Iterator[None]:
    """Use another attention implementation for a while."""
    causal_lm.set_attn_implementation(name)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(NAME)
