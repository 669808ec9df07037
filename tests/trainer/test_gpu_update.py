"""The update on a GPU: right against float64 on the CPU, without waiting, repeatable, however it is cut and placed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.gpu.update_cases import gradient_error, plain_gradients, step, step_gradients
from fastgrpo import packing
from fastgrpo.config import GRPOConfig
from fastgrpo.optim import Optimizer
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import PackedBatch, Prompt, Rollout
from fastgrpo.update import Updater
from fastgrpo_kernels import LossOutput

pytestmark = pytest.mark.gpu

DEVICE, DTYPE = "cuda:0", "bfloat16"
_PROMPTS = (300, 40, 1, 7)
"""Long enough for positions to matter."""

_SIZES = {
    "vocab_size": 105,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _fresh(family: str, dtype: torch.dtype, **extra: Any) -> Any:
    """The same weights for any dtype, but for their rounding."""
    config = getattr(transformers, f"{family}Config")(**_SIZES, **extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)  # not the buffers: frequencies stay what they are
    return model


def _rollouts(groups: int = 4, n: int = 4, seed: int = 0) -> list[Rollout]:
    """Some completions without an advantage."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for group in range(groups):
        width = _PROMPTS[group % len(_PROMPTS)]
        prompt = Prompt(group, "", torch.randint(3, 105, (width,), generator=g).tolist())
        for i in range(n):
            length = int(torch.randint(1, 60, (), generator=g))
            ids = torch.randint(3, 105, (length,), generator=g).tolist()
            advantage = 0.0 if i == 2 else float(torch.randn((), generator=g))
            made.append(Rollout(prompt, group, ids, torch.zeros(length), True, reward=0.0, advantage=advantage))
    return made


def _updater(tokenizer: Any, model: Any = None, **options: Any) -> Updater:
    base = {"device": DEVICE, "dtype": DTYPE, "max_grad_norm": 0.0, "num_generations": 4, "max_completion_length": 64}
    config = GRPOConfig(**{**base, **options})
    policy = load_policy(model or _fresh("Qwen2", torch.bfloat16), tokenizer, config)
    return Updater(policy, None, Optimizer(policy.trainable(), config), config)


def _error(found: list[Tensor], true: list[Tensor]) -> float:
    return gradient_error([g.cpu() for g in found], true)


def _true(model: Any, chosen: list[Rollout]) -> list[Tensor]:
    """In float64 on the CPU, the denominator that of all tokens."""
    return plain_gradients(model.cpu().double(), chosen, torch.float64)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_gradients_in_bfloat16(share: bool, fused: bool, family: str, tiny_tokenizer: Any) -> None:
    """No further from float64 than 1.5 x each sequence alone, through transformers, in bfloat16."""
    chosen, heads = _rollouts(), {"head_dim": 64} if family == "Qwen3" else {}
    true = _true(_fresh(family, torch.float64, **heads), chosen)
    alone = plain_gradients(_fresh(family, torch.bfloat16, **heads).to(DEVICE), chosen, torch.float32)
    model = _fresh(family, torch.bfloat16, **heads)
    updater = _updater(tiny_tokenizer, model, share_prompts=share, fused_layers=fused)
    assert updater.policy.shares == share, updater.policy.unshared
    found = step_gradients(updater, chosen)
    assert _error(found, true) <= 1.5 * _error(alone, true) + 1e-4


def test_layers_are_fused_where_nothing_else_is_said(tiny_tokenizer: Any) -> None:
    kinds = [
        type(_updater(tiny_tokenizer, fused_layers=asked).policy.causal_lm.model.layers[0])
        for asked in (None, True, False)
    ]
    assert kinds[0] is kinds[1]
    assert kinds[1] is not kinds[2]


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_in_float32(fused: bool, tiny_tokenizer: Any) -> None:
    """No flash attention for these: sequences are packed plainly."""
    chosen = _rollouts()
    updater = _updater(tiny_tokenizer, _fresh("Qwen2", torch.float32), dtype="float32", fused_layers=fused)
    assert _error(step_gradients(updater, chosen), _true(_fresh("Qwen2", torch.float64), chosen)) <= 1e-5


@pytest.mark.parametrize("budget", [100_000, 450])
@pytest.mark.parametrize("share", [True, False])
def test_repeats_bitwise(share: bool, budget: int, tiny_tokenizer: Any) -> None:
    updater = _updater(tiny_tokenizer, share_prompts=share, max_tokens_per_microbatch=budget)
    chosen = _rollouts(groups=12)
    first = step_gradients(updater, chosen)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step_gradients(updater, chosen), first, strict=True))


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"share_prompts": False}], ids=str)
def test_nothing_waits_until_the_one_transfer(
    options: dict[str, Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = _updater(tiny_tokenizer, max_tokens_per_microbatch=450, **options)
    chosen, reduce = _rollouts(groups=12), LossOutput.reduce
    for _ in range(2):  # warm-up: kernels are compiled and loaded
        assert step(updater, chosen)["perf/microbatches"] > 4

    def lifted(outputs: Any) -> dict[str, float]:
        assert torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")
        return reduce(outputs)

    monkeypatch.setattr(LossOutput, "reduce", staticmethod(lifted))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(updater, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prefetched_microbatches_are_those_that_were_packed(tiny_tokenizer: Any) -> None:
    """While the device lags behind the host, and memory is freed and asked for again."""
    policy = _updater(tiny_tokenizer).policy
    made = packing.pack(_rollouts(groups=40), max_tokens=400, share=True)
    assert len(made) > 20
    load = torch.randn(2048, 2048, device=DEVICE)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    same = [[t.to(DEVICE) for t in batch.tensors()] for batch in made]
    for placed, tensors in zip(policy.placed(made), same, strict=True):
        for _ in range(4):
            load @ load
        junk = [torch.full_like(t, 77) for t in tensors]
        for a, b in zip(placed.tensors(), tensors, strict=True):
            wrong += (a != b).sum()
        del junk
    assert int(wrong) == 0


def test_prefetching_changes_nothing(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updater = _updater(tiny_tokenizer, share_prompts=False, max_tokens_per_microbatch=450)
    chosen = _rollouts(groups=12)
    ahead = step_gradients(updater, chosen)

    def one_by_one(policy: Policy, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        for batch in batches:
            placed = batch.to(policy.device)
            torch.cuda.synchronize()
            yield placed

    monkeypatch.setattr(Policy, "placed", one_by_one)
    assert all(torch.equal(a, b) for a, b in zip(step_gradients(updater, chosen), ahead, strict=True))


@pytest.mark.parametrize("share", [True, False])
def test_the_cut_into_microbatches_changes_little(share: bool, tiny_tokenizer: Any) -> None:
    """Gradients add up in fp32, whatever the model's dtype: what is left is the rounding of each one to bfloat16."""
    chosen = _rollouts(groups=12)
    true = _true(_fresh("Qwen2", torch.float64), chosen)
    alone = _error(plain_gradients(_fresh("Qwen2", torch.bfloat16).to(DEVICE), chosen, torch.float32), true)
    for budget in (450, 1500, 100_000):
        updater = _updater(tiny_tokenizer, share_prompts=share, max_tokens_per_microbatch=budget)
        assert _error(step_gradients(updater, chosen), true) <= 1.5 * alone + 1e-4, budget


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing(every: int, tiny_tokenizer: Any) -> None:
    """The same kernels on the same numbers, a second time."""
    chosen = _rollouts()
    kept = step_gradients(_updater(tiny_tokenizer, share_prompts=False), chosen)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_every": every}
    found = step_gradients(_updater(tiny_tokenizer, share_prompts=False, **options), chosen)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    shared = step_gradients(_updater(tiny_tokenizer, **options), chosen)
    assert _error(shared, [g.cpu() for g in kept]) <= 2e-2


def test_a_sliding_window_is_packed_plainly(tiny_tokenizer: Any) -> None:
    chosen, window = _rollouts(), {"sliding_window": 16}
    updater = _updater(tiny_tokenizer, _fresh("Mistral", torch.bfloat16, **window))
    assert "window" in (updater.policy.unshared or "")
    true = _true(_fresh("Mistral", torch.float64, **window), chosen)
    alone = plain_gradients(_fresh("Mistral", torch.bfloat16, **window).to(DEVICE), chosen, torch.float32)
    assert _error(step_gradients(updater, chosen), true) <= 1.5 * _error(alone, true) + 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters(checkpointing: bool, tiny_tokenizer: Any) -> None:
    pytest.importorskip("peft")
    chosen = _rollouts()
    updater = _updater(tiny_tokenizer, use_peft=True, lora_r=4, gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(1)
    for name, p in updater.policy.trainable():
        if "lora_B" in name:  # zeros at first, which would hide half of the gradient
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    found = step_gradients(updater, chosen)
    base = copy.deepcopy(updater.policy.model).get_base_model()
    base.set_attn_implementation("eager")
    alone = plain_gradients(base, chosen, torch.float32)
    true = _true(base, chosen)
    assert len(found) == len(true) > 0
    assert _error(found, true) <= 1.5 * _error(alone, true) + 1e-4
