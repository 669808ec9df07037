"""The packed forward in which completions share prompts, against each sequence alone; what cannot share, and why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import float64_throughout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgrpo.config import GRPOConfig
from fastgrpo.loss import policy_loss
from fastgrpo.optim import Optimizer
from fastgrpo.packing import denominators, pack
from fastgrpo.policy import Policy, Reference, load_policy
from fastgrpo.policy.attention import CannotShareError, Packed, packed_attention
from fastgrpo.records import Prompt, Rollout, RolloutBatch
from fastgrpo.update import Updater
from fastgrpo_kernels import PackedLayout

_GROUPS = [(5, [4, 1, 7, 3]), (1, [6, 2]), (8, [5]), (3, [2, 2, 9])]


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


def test_dropout_that_no_config_names_is_refused_when_it_acts() -> None:
    q = torch.zeros(1, 2, 5, 8)
    shared = Packed(PackedLayout((2,), ((1, 2),)))
    assert packed_attention(q, q, q, shared).shape == (1, 5, 2, 8)
    with pytest.raises(CannotShareError, match=r"attention dropout of 0\.5"):
        packed_attention(q, q, q, shared, dropout=0.5)


def test_self_check_finds_a_model_that_sharing_would_change(tiny_model_dir: Path, monkeypatch: Any) -> None:
    """Positions that start anew in every completion stand for any layer that does not know of shared prompts."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    assert policy.shares
    states = Policy.states

    def anew(self: Policy, ids: torch.Tensor, packed: Packed) -> torch.Tensor:
        if packed.layout.shares:
            packed.layout.position_ids = torch.cat([torch.arange(n) for n in (5, 4, 3, 2)])
        return states(self, ids, packed)

    monkeypatch.setattr(Policy, "states", anew)
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
    loss = torch.zeros((), dtype=policy.dtype)
    for batch in pack(rollouts, max_tokens=budget, share=share):
        options: Any = {"config": config.loss_config(), "temperature": 0.9, "whole": whole}
        output = policy_loss(policy.hidden(batch), policy.head, batch, **options)
        output.loss.backward()
        loss += output.loss.detach()
    return loss, [p.grad for _, p in policy.trainable()]


def _differences(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "reinforce"]
_BATCHES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=4
)
_CUTS = {"budget": st.integers(1, 60), "share": st.booleans(), "order": st.randoms(use_true_random=False)}
_RUNS: Any = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def _cut_changes(policy: Policy, rollouts: list[Rollout], config: GRPOConfig, cut: dict[str, Any]) -> tuple[Any, Any]:
    """How much loss and gradient differ from those of one micro-batch, relative to them."""
    loss, gradients = _gradients(policy, rollouts, config, budget=10_000, share=True)
    cut["order"].shuffle(rollouts)
    other_loss, others = _gradients(policy, rollouts, config, budget=cut["budget"], share=cut["share"])
    # Of the whole gradient: of a single element the model's own fp32 rounding is up to 1.3e-6 of the largest.
    error, size = (torch.cat([g.flatten() for g in x]).norm() for x in (_differences(others, gradients), gradients))
    return abs(other_loss - loss) / max(1.0, abs(loss)), error / size


@pytest.mark.parametrize("loss_type", _LOSSES)
@settings(max_examples=5, **_RUNS)
@given(groups=_BATCHES, cut=st.fixed_dictionaries(_CUTS))
def test_any_cut_order_and_sharing_give_the_same_loss_and_gradients(
    loss_type: str, groups: Any, cut: dict[str, Any], tiny_model_dir: Path
) -> None:
    config = _loss_config(loss_type)
    policy = load_policy(str(tiny_model_dir), None, config)
    loss, gradient = _cut_changes(policy, _rollouts(groups, vocab=105), config, cut)
    assert loss <= 1e-6
    assert gradient <= 1e-6


@pytest.mark.parametrize("loss_type", _LOSSES)
@settings(max_examples=4, **_RUNS)
@given(groups=_BATCHES, cut=st.fixed_dictionaries(_CUTS), level=st.sampled_from(["token", "sequence"]))
def test_nor_do_they_change_in_float64_with_every_term_in_force(
    loss_type: str, groups: Any, cut: dict[str, Any], level: str, tiny_model_dir: Path
) -> None:
    """Ratios, KL, corrections and the entropy bonus amplify fp32's rounding to some 3e-6; float64 shows the rest."""
    terms = {"beta": 0.1, "sampling_correction": "token_truncate", "entropy_coef": 0.01, "delta": 1.5}
    config = _loss_config(loss_type, importance_sampling_level=level, **terms)
    policy = Policy(load_policy(str(tiny_model_dir), None, config).model.double(), None)
    policy.self_check()
    rollouts = _rollouts(groups, vocab=105)
    [batch] = pack(rollouts, max_tokens=10_000)
    own = policy.logprobs(batch, 0.9)[0].float().split(batch.cu_seqlens.diff().tolist())
    for member, logprob in zip(batch.members, own, strict=True):
        r, noise = rollouts[member], rollouts[member].sampling_logprob + 0.5
        r.old_logprob, r.ref_logprob, r.sampling_logprob = logprob + 0.3 * noise, logprob - noise, logprob + 0.4 * noise
    with float64_throughout():
        loss, gradient = _cut_changes(policy, rollouts, config, cut)
    assert loss <= 1e-12
    assert gradient <= 1e-10


def _loss_config(loss_type: str, **options: Any) -> GRPOConfig:
    return GRPOConfig(**{"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else None, **options})


def test_gradient_checkpointing_and_adapters(tiny_model_dir: Path) -> None:
    [batch] = pack(_rollouts(), max_tokens=1000, share=True)
    for adapters in (False, True):
        gradients = []
        for checkpointing in (False, True):
            config = GRPOConfig(gradient_checkpointing=checkpointing, use_peft=adapters, lora_r=2 if adapters else 16)
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


def test_notes_say_what_does_not_fit(tiny_model_dir: Path) -> None:
    def notes(**options: Any) -> list[str]:
        config = GRPOConfig(**options)
        policy = load_policy(str(tiny_model_dir), None, config)
        return Updater(policy, None, Optimizer(policy.trainable(), config), config).notes()

    assert notes() == notes(share_prompts=False) == []
    [note] = notes(max_prompt_length=20, max_completion_length=30, max_tokens_per_microbatch=49)
    assert "max_tokens_per_microbatch=49 is less than a sequence may have, 50" in note

    config = GRPOConfig()
    policy = load_policy(str(tiny_model_dir), None, config)
    policy.unshared = "no reason"
    [note] = Updater(policy, None, Optimizer(policy.trainable(), config), config).notes()
    assert note == "each completion gets a copy of its prompt in the update: no reason"


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
