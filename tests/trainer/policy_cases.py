"""A small policy twice, and batches on which both must give the same numbers and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastgrpo import layers
from fastgrpo.packing import pack
from fastgrpo.policy import Policy
from fastgrpo.policy.attention import register
from fastgrpo.records import PackedBatch, Prompt, Rollout

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
GROUPS = [(5, [4, 1, 7, 3]), (1, [6, 2]), (8, [5]), (3, [2, 2, 9])]
# Other lengths, numbers of prompts and of completions, of tokens; a lone completion, lengths of 1.
OTHERS = [[(5, [4])], [(1, [1, 1]), (1, [1])], [(30, [9] * 6)], [(4, [2, 40]), (60, [1])], [(3, [3])] * 9]


def two_policies(
    family: str, *, lora: bool = False, tied: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Policy]:
    """The same model twice; options are the config's."""
    config = getattr(transformers, f"{family}Config")(**SMALL | options, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    model.set_attn_implementation(register())
    if lora:
        from peft import LoraConfig, get_peft_model

        adapters = {"target_modules": ["q_proj"], "init_lora_weights": False, "r": 2}
        model = get_peft_model(model, LoraConfig(**adapters)).eval()
    return [Policy(model, None), Policy(copy.deepcopy(model), None)]


def make_batch(groups: list[tuple[int, list[int]]] = GROUPS, *, share: bool = True) -> PackedBatch:
    generator = torch.Generator().manual_seed(7)
    rollouts = []
    for g, (length, lengths) in enumerate(groups):
        prompt = Prompt(g, "", torch.randint(3, 61, (length,), generator=generator).tolist())
        for c in lengths:
            ids = torch.randint(3, 61, (c,), generator=generator).tolist()
            rollouts.append(Rollout(prompt, g, ids, torch.zeros(c), finished=True, reward=1.0))
    [batch] = pack(rollouts, max_tokens=10_000, share=share)
    return batch


def gradients_of(policy: Policy, batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
    """Logits of the scored tokens, and the gradients of a loss that weighs each of them otherwise."""
    policy.model.zero_grad(set_to_none=True)
    with policy.mode(training=True):
        logits = policy.head.logits(policy.hidden(batch))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * weights).sum().backward()
    return logits.detach(), [p.grad for _, p in policy.trainable() if p.grad is not None]


def assert_same(policies: list[Policy], batch: PackedBatch, tolerance: float = 1e-6) -> None:
    (logits, gradients), (other_logits, others) = (gradients_of(policy, batch) for policy in policies)
    assert (other_logits - logits).abs().max() <= tolerance * logits.abs().max()
    largest = max(g.abs().max() for g in gradients)
    assert len(gradients) == len(policies[0].trainable())
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).abs().max() <= tolerance * largest
    (logprob, entropy), (other, other_entropy) = (policy.logprobs(batch, 0.9) for policy in policies)
    assert (other - logprob).abs().max() <= tolerance * logprob.abs().max()
    assert (other_entropy - entropy).abs().max() <= tolerance * entropy.abs().max()


def round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused norms in which one element of ten is rounded otherwise, as a GPU's may be."""
    generator, own = torch.Generator().manual_seed(0), layers.add_rms_norm

    def norm(x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = own(x, residual, weight, eps=eps)
        unit = torch.where(torch.rand(normed.shape, generator=generator) < 0.1, torch.finfo(normed.dtype).eps, 0.0)
        return (normed + normed * unit).to(normed.dtype), total

    monkeypatch.setattr(layers, "add_rms_norm", norm)
