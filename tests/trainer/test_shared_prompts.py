"""The packed forward in which completions share prompts, against each sequence alone; what cannot share, and why."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgrpo.config import GRPOConfig
from fastgrpo.loss import policy_loss
from fastgrpo.optim import Optimizer
from fastgrpo.packing import denominators, pack
from fastgrpo.policy import Policy, Reference, load_policy
from fastgrpo.policy.attention import CannotShareError, SharedPrompts, register, shared_attention
from fastgrpo.records import Prompt, Rollout, RolloutBatch
from fastgrpo.update import Updater

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_SHARE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 8, **_MOE}),
    "mistral-wide-window": ("Mistral", {"sliding_window": 64}),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.4}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "gpt_neox": ("GPTNeoX", {}),
}
_PLAIN: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 64}, "attention scores capped at 50"),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 4}, "a sliding window of 4 tokens, less than .* 64"),
    "mistral": ("Mistral", {"sliding_window": 30}, "a sliding window of 30 tokens, less than .* 64"),
    "cohere2": ("Cohere2", {"sliding_window": 4}, "a sliding window of 4 tokens, less than .* 64"),
    "dropout": ("Llama", {"attention_dropout": 0.1}, "attention dropout of 0.1"),
}
_FP32_INSIDE = {
    "qwen3-moe": "torch has no grouped matrix product in float64, and the router computes in fp32",
    "cohere": "transformers rotates its queries and keys in fp32",
}
_GROUPS = [(5, [4, 1, 7, 3]), (1, [6, 2]), (8, [5]), (3, [2, 2, 9])]


def _model(family: str, extra: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    kind = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{kind}Config")(**{**_SMALL, **extra}, initializer_range=0.2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    model.set_attn_implementation(register())
    return model


def _norms_in_float64(model: Any) -> None:
    """transformers' own norms compute in fp32: a prompt's gradient rounds once when shared, else once a completion."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            kind = (
                torch.nn.functional.layer_norm if "LayerNorm" in type(module).__name__ else torch.nn.functional.rms_norm
            )
            shape, options = module.weight.shape, {"weight": module.weight, "eps": module.variance_epsilon}
            module.forward = partial(kind, normalized_shape=shape, **options)


def _rollouts(groups: list[tuple[int, list[int]]] = _GROUPS, vocab: int = 61) -> list[Rollout]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for g, (prompt_length, lengths) in enumerate(groups):
        prompt = Prompt(g, "", torch.randint(3, vocab, (prompt_length,), generator=generator).tolist())
        for c in lengths:
            ids = torch.randint(3, vocab, (c,), generator=generator).tolist()
            r = Rollout(prompt, g, ids, -torch.rand(c, generator=generator), finished=True, reward=1.0)
            r.advantage = float(torch.randn((), generator=generator))
            made.append(r)
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", sorted(_SHARE))
def test_logits_and_gradients_are_those_of_each_sequence_alone(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and name in _FP32_INSIDE:
        pytest.skip(_FP32_INSIDE[name])
    model, stock = _model(*_SHARE[name], dtype), _model(*_SHARE[name], dtype)
    if dtype == torch.float64:
        _norms_in_float64(model)
        _norms_in_float64(stock)
    stock.set_attn_implementation("sdpa")
    policy = Policy(model, None)
    if dtype == torch.float32:  # the check's eager attention takes its softmax in fp32 whatever the dtype
        policy.self_check()
        assert policy.unshared is None
    rollouts = _rollouts()
    [batch] = pack(rollouts, max_tokens=1000, share=True)
    assert any(batch.completion_lengths)
    packed = policy.head.logits(policy.hidden(batch))
    alone = []
    for r in (rollouts[m] for m in batch.members):
        ids = torch.tensor([*r.prompt.token_ids, *r.token_ids])
        alone.append(stock(input_ids=ids[None], use_cache=False).logits[0, len(r.prompt.token_ids) - 1 : -1])
    expected = torch.cat(alone)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert (packed - expected).abs().max() <= tolerance * expected.abs().max()

    direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    (packed * direction).sum().backward()
    (expected * direction).sum().backward()
    largest = max(p.grad.abs().max() for p in stock.parameters() if p.grad is not None)
    for (n, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, n
        else:
            assert (p.grad - q.grad).abs().max() <= tolerance * largest, n


@pytest.mark.parametrize("name", sorted(_PLAIN))
def test_what_cannot_share_is_packed_plainly_and_says_why(name: str) -> None:
    family, extra, reason = _PLAIN[name]
    policy = Policy(_model(family, extra, torch.float32), None)
    policy.self_check()
    assert not policy.shares
    assert policy.unshared is not None
    assert re.search(reason, policy.unshared)
    if name in ("gemma2", "gemma3", "cohere2"):  # what these sequences would run into
        [batch] = pack(_rollouts(), max_tokens=1000, share=True)
        with pytest.raises(CannotShareError, match="set share_prompts to false"):
            policy.hidden(batch)


def test_a_window_as_long_as_every_sequence_shares() -> None:
    policy = Policy(_model("Mistral", {"sliding_window": 30}, torch.float32), None)
    policy.self_check(longest=30)
    assert policy.shares
    policy.self_check(longest=31)
    assert policy.unshared == "a sliding window of 30 tokens, less than a sequence of 31"
    policy.self_check(longest=30, share_prompts=False)
    assert policy.unshared == "share_prompts is off"


def test_dropout_that_no_config_names_is_refused_when_it_acts() -> None:
    q = torch.zeros(1, 2, 5, 8)
    shared = SharedPrompts((2,), ((1, 2),), q.device)
    assert shared_attention(q, q, q, shared).shape == (1, 5, 2, 8)
    with pytest.raises(CannotShareError, match=r"attention dropout of 0\.5"):
        shared_attention(q, q, q, shared, dropout=0.5)


def test_self_check_finds_a_model_that_sharing_would_change(tiny_model_dir: Path, monkeypatch: Any) -> None:
    """Positions that start anew in every completion stand for any layer that does not know of shared prompts."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    assert policy.shares
    states = Policy._states

    def anew(self: Policy, ids: torch.Tensor, positions: torch.Tensor, segments: Any) -> torch.Tensor:
        if isinstance(segments, SharedPrompts):
            positions = torch.cat([torch.arange(n) for n in (5, 4, 3, 2)])
        return states(self, ids, positions, segments)

    monkeypatch.setattr(Policy, "_states", anew)
    policy.self_check()
    assert policy.unshared is not None
    assert policy.unshared.startswith("other logits than the model's own forward")


def test_perturbing_one_completion_changes_no_other_bitwise(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    rollouts = _rollouts()
    [before] = pack(rollouts, max_tokens=1000, share=True)
    rollouts[2].token_ids = [5] * 7
    rollouts[9].token_ids = [6] * 9
    [after] = pack(rollouts, max_tokens=1000, share=True)
    assert before.members == after.members
    first, second = policy.logprobs(before, 1.0)[0], policy.logprobs(after, 1.0)[0]
    sizes = before.cu_seqlens.diff().tolist()
    for m, a, b in zip(before.members, first.split(sizes), second.split(sizes), strict=True):
        assert torch.equal(a, b) == (m not in (2, 9))


def _gradients(policy: Policy, rollouts: list[Rollout], config: GRPOConfig, *, budget: int, share: bool) -> Any:
    policy.model.zero_grad(set_to_none=True)
    whole = denominators(rollouts, mask_truncated=False)
    loss = torch.zeros(())
    for batch in pack(rollouts, max_tokens=budget, share=share):
        options: Any = {"config": config.loss_config(), "temperature": 0.9, "whole": whole}
        output = policy_loss(policy.hidden(batch), policy.head, batch, **options)
        output.loss.backward()
        loss += output.loss.detach()
    return loss, [p.grad for _, p in policy.trainable()]


def _differences(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=4
    ),
    budget=st.integers(1, 60),
    loss_type=st.sampled_from(["grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]),
    share=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_any_cut_order_and_sharing_give_the_same_loss_and_gradients(
    groups: Any, budget: int, loss_type: str, share: bool, order: Any, tiny_model_dir: Path
) -> None:
    config = GRPOConfig(loss_type=loss_type, epsilon_high=5.0 if loss_type == "cispo" else None)  # type: ignore[arg-type]
    policy = load_policy(str(tiny_model_dir), None, config)
    rollouts = _rollouts(groups, vocab=105)
    loss, gradients = _gradients(policy, rollouts, config, budget=10_000, share=True)
    order.shuffle(rollouts)
    cut_loss, cut = _gradients(policy, rollouts, config, budget=budget, share=share)
    assert abs(cut_loss - loss) <= 1e-6 * max(1.0, abs(loss))
    # Of the whole gradient: of a single element the model's own fp32 rounding is up to 1.3e-6 of the largest.
    error, size = (torch.cat([g.flatten() for g in x]).norm() for x in (_differences(cut, gradients), gradients))
    assert error <= 1e-6 * size


def test_gradient_checkpointing_and_adapters(tiny_model_dir: Path) -> None:
    [batch] = pack(_rollouts(), max_tokens=1000, share=True)
    for adapters in (False, True):
        gradients = []
        for checkpointing in (False, True):
            config = GRPOConfig(gradient_checkpointing=checkpointing, use_peft=adapters, lora_r=2)
            policy = load_policy(str(tiny_model_dir), None, config)
            assert policy.shares
            with policy.mode(training=True):
                policy.hidden(batch).square().sum().backward()
            gradients.append([p.grad for _, p in policy.trainable()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_generation_still_works_and_the_reference_takes_the_same_path(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    [batch] = pack(_rollouts(), max_tokens=1000, share=True)
    logprob = policy.logprobs(batch, 1.0)[0]
    assert torch.equal(Reference(policy).logprobs(batch, 1.0)[0], logprob)
    stock = copy.deepcopy(policy.model)
    stock.set_attn_implementation("eager")
    ids = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(3))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(policy.model.generate(ids, **options), stock.generate(ids, **options))


def test_what_sharing_saved_is_in_the_metrics(tiny_model_dir: Path) -> None:
    groups = [(20, [4, 5, 6, 7]), (10, [3, 3, 3, 3])]
    ratios = []
    for share in (True, False):
        config = GRPOConfig(
            num_prompts_per_step=2, num_generations=4, max_tokens_per_microbatch=42, share_prompts=share
        )
        policy = load_policy(str(tiny_model_dir), None, config)
        updater = Updater(policy, None, Optimizer(policy.trainable(), config), config)
        metrics, applied = updater.step(RolloutBatch(_rollouts(groups), {}), 1e-3)
        assert applied
        assert metrics["perf/skipped_token_fraction"] == 0.0
        ratios.append(metrics["perf/prompt_sharing_ratio"])
        if share:  # 20 + 22 tokens in one micro-batch, 10 + 12 in the other
            assert metrics["perf/microbatches"] == 2
            assert metrics["perf/packing_efficiency"] == pytest.approx((42 + 22) / (2 * 42))
    assert ratios == [pytest.approx((4 * 20 + 4 * 10 + 34) / (20 + 10 + 34)), 1.0]
