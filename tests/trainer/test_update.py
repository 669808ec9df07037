"""One optimizer step against the same step written naively: every sequence alone, full logits, autograd."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.advantages import assign_advantages, group_signal
from fastgrpo.collect import batch_metrics
from fastgrpo.config import GRPOConfig
from fastgrpo.optim import Optimizer
from fastgrpo.policy import Policy, Reference, load_policy
from fastgrpo.records import Prompt, Rollout, RolloutBatch
from fastgrpo.update import Updater, _quantile

_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "reinforce"]


def _batch(lengths: list[int] | None = None, seed: int = 0) -> RolloutBatch:
    """Three groups of four with rewards, one failed sample, one truncated one, and a group without a signal."""
    generator = torch.Generator().manual_seed(seed)
    rewards = [1, 0, 0, 1, 0.5, math.nan, 0, 1, 1, 1, 1, 1]
    lengths = lengths or [3, 7, 1, 5, 4, 6, 2, 8, 3, 3, 5, 2]
    rollouts = []
    for i, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        prompt = Prompt(i // 4, "", list(range(10, 13 + i // 4)))
        ids = torch.randint(5, 100, (length,), generator=generator).tolist()
        sampling = -torch.rand(length, generator=generator) * 3
        rollouts.append(Rollout(prompt, i // 4, ids, sampling, i != 7, rewards={"r": reward}, reward=reward))
    return RolloutBatch(rollouts, {})


def _config(**options: Any) -> GRPOConfig:
    base = {"num_prompts_per_step": 3, "num_generations": 4, "max_completion_length": 8, "max_grad_norm": 0.0}
    base["check_sampling"] = False  # the log-probs here are made up
    if options.get("loss_type") == "cispo":
        base["epsilon_high"] = 5.0
    return GRPOConfig(**{**base, **options})


def _updater(source: Path, config: GRPOConfig) -> Updater:
    policy = load_policy(str(source), None, config)
    reference = Reference(policy) if config.beta > 0 else None
    return Updater(policy, reference, Optimizer(policy.trainable(), config), config)


def _gradients(updater: Updater, batch: RolloutBatch) -> tuple[list[Tensor], dict[str, float]]:
    """The gradients the optimizer is about to apply."""
    seen: list[Tensor] = []
    hook = updater.optimizer.torch_optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for _, p in updater.policy.trainable())  # type: ignore[union-attr]
    )
    metrics, applied = updater.step(batch, 1e-3)
    hook.remove()
    assert applied
    return seen, metrics


def _naive_grpo_gradients(source: Path, batch: RolloutBatch, config: GRPOConfig, reference: Policy) -> list[Tensor]:
    """DeepSeekMath's loss on one sequence at a time, token-level clip, k3; aggregation of grpo or dapo."""
    policy = load_policy(str(source), None, config)
    valid = [r for r in batch.rollouts if not r.failed]
    tokens = sum(r.num_tokens for r in valid)
    total: Any = 0.0
    for r in valid:
        ids = torch.tensor([[*r.prompt.token_ids, *r.token_ids]])
        rows = slice(len(r.prompt.token_ids) - 1, -1)

        def logprob(model: Any, ids: Tensor = ids, rows: slice = rows, r: Rollout = r) -> Tensor:
            logits = model(input_ids=ids, use_cache=False).logits[0, rows] / config.temperature
            return logits.log_softmax(-1).gather(1, torch.tensor(r.token_ids)[:, None]).squeeze(1)

        logp = logprob(policy.model)
        ratio = (logp - logp.detach()).exp()
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
        loss = -torch.minimum(ratio * r.advantage, clipped * r.advantage)
        with torch.no_grad():
            d = logprob(reference.model)
        loss = loss + config.beta * ((d - logp).exp() - (d - logp) - 1)
        total = total + (loss.mean() / len(valid) if config.loss_type == "grpo" else loss.sum() / tokens)
    total.backward()
    return [p.grad for _, p in policy.trainable()]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("budget", [11, 40, 10_000])
def test_gradients_are_those_of_the_naive_loss(
    loss_type: str, budget: int, tiny_model_dir: Path, tiny_untied_model_dir: Path
) -> None:
    config = _config(loss_type=loss_type, beta=0.3, temperature=0.8, max_tokens_per_microbatch=budget)
    updater = _updater(tiny_model_dir, config)
    # Another model as the reference, so that the KL term has a gradient from the first step.
    other = load_policy(str(tiny_model_dir), None, config)
    with torch.no_grad():
        for _, p in other.trainable():
            p.add_(0.02 * torch.ones_like(p))
    assert updater.reference is not None
    updater.reference.frozen = other
    batch = _batch()
    assign_advantages(batch.rollouts, {"r": 1.0}, config)
    expected = _naive_grpo_gradients(tiny_model_dir, batch, config, other)
    updater.prepare(batch)
    gradients, metrics = _gradients(updater, batch)
    for g, e in zip(gradients, expected, strict=True):
        assert (g - e).abs().max() <= 2e-5 * e.abs().max() + 1e-8
    assert metrics["kl"] > 0


@pytest.mark.parametrize("loss_type", _LOSSES)
def test_the_cut_into_microbatches_changes_nothing(loss_type: str, tiny_model_dir: Path) -> None:
    results = []
    for budget in (10, 33, 10_000):
        config = _config(
            loss_type=loss_type, max_tokens_per_microbatch=budget, entropy_coef=0.01, beta=0.1, top_entropy_quantile=0.6
        )
        updater = _updater(tiny_model_dir, config)
        batch = _batch()
        assign_advantages(batch.rollouts, {"r": 1.0}, config)
        updater.prepare(batch)
        results.append(_gradients(updater, batch))
    whole, whole_metrics = results[-1]
    scale = max(g.abs().max() for g in whole)
    for gradients, metrics in results[:-1]:
        assert metrics["perf/microbatches"] > 1
        for g, e in zip(gradients, whole, strict=True):
            assert (g - e).abs().max() <= 1e-6 * scale
        for name in ("loss", "entropy", "kl", "clip_ratio/region_mean"):
            assert metrics[name] == pytest.approx(whole_metrics[name], rel=1e-5, abs=1e-6)


def test_only_tokens_of_high_entropy_keep_their_policy_loss(tiny_model_dir: Path) -> None:
    """Against the naive loss with torch's own quantile over the step's trained tokens."""
    share = 0.3
    config = _config(top_entropy_quantile=share, loss_type="dapo", max_tokens_per_microbatch=25)
    updater = _updater(tiny_model_dir, config)
    batch = _batch()
    assign_advantages(batch.rollouts, {"r": 1.0}, config)
    policy = load_policy(str(tiny_model_dir), None, config)
    valid = [r for r in batch.rollouts if not r.failed]
    entropies, terms = [], []
    for r in valid:
        ids = torch.tensor([[*r.prompt.token_ids, *r.token_ids]])
        logp = policy.model(input_ids=ids, use_cache=False).logits[0, len(r.prompt.token_ids) - 1 : -1].log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1).detach())
        own = logp.gather(1, torch.tensor(r.token_ids)[:, None]).squeeze(1)
        terms.append(-(own - own.detach()).exp() * r.advantage)
    every = torch.cat(entropies)
    threshold = torch.quantile(every.double(), 1 - share)
    kept = every >= threshold
    assert 0.25 < kept.double().mean() < 0.35
    (torch.cat(terms)[kept].sum() / len(every)).backward()
    expected = [p.grad for _, p in policy.trainable()]
    gradients, _ = _gradients(updater, batch)
    scale = max(e.abs().max() for e in expected if e is not None)
    for g, e in zip(gradients, expected, strict=True):
        assert e is not None
        assert (g - e).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_quantile_is_torchs(q: float) -> None:
    for n in (1, 2, 7, 100):
        values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(_quantile(values, q), torch.quantile(values, q), rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss_type", _LOSSES)
def test_skipping_dead_sequences_is_exact(loss_type: str, tiny_model_dir: Path) -> None:
    results = []
    for skip in (True, False):
        config = _config(loss_type=loss_type, skip_zero_advantage=skip)
        updater = _updater(tiny_model_dir, config)
        batch = _batch()
        assign_advantages(batch.rollouts, {"r": 1.0}, config)
        results.append(_gradients(updater, batch))
    (skipped, some), (computed, none) = results
    assert some["perf/skipped_token_fraction"] > none["perf/skipped_token_fraction"]
    scale = max(g.abs().max() for g in computed)
    for a, b in zip(skipped, computed, strict=True):
        assert (a - b).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("option", [{"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}])
def test_nothing_is_skipped_when_that_would_not_be_exact(option: dict[str, float], tiny_model_dir: Path) -> None:
    updater = _updater(tiny_model_dir, _config(**option))
    assert not updater.skip_zero


def test_a_step_with_nothing_to_compute_is_a_step(tiny_model_dir: Path) -> None:
    updater = _updater(tiny_model_dir, _config())
    batch = _batch()
    metrics, applied = updater.step(batch, 1e-3)
    assert applied
    assert metrics["loss"] == 0.0
    assert metrics["grad_norm"] == 0.0


def test_failed_samples_do_not_train_and_leave_the_denominators(tiny_model_dir: Path) -> None:
    """Replacing a failed sample's completion by any other changes no gradient."""
    config = _config(loss_type="dapo", beta=0.1)
    gradients = []
    for junk in ([7], list(range(20, 90))):
        updater = _updater(tiny_model_dir, config)
        batch = _batch()
        batch.rollouts[5].token_ids = junk
        assign_advantages(batch.rollouts, {"r": 1.0}, config)
        updater.prepare(batch)
        gradients.append(_gradients(updater, batch)[0])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_old_logprobs_of_several_iterations_and_minibatches(tiny_model_dir: Path) -> None:
    """Every completion is compared with the policy before the first step, whichever step it is used in."""
    config = _config(num_iterations=2, num_minibatches=3, learning_rate=1e-2, beta=0.1)
    updater = _updater(tiny_model_dir, config)
    start = load_policy(str(tiny_model_dir), None, config)
    batch = _batch()
    assign_advantages(batch.rollouts, {"r": 1.0}, config)
    updater.prepare(batch)
    ratios = []
    for _ in range(config.steps_per_batch):
        metrics, _ = updater.step(batch, 1e-2)
        ratios.append(metrics["clip_ratio/region_mean"])
    assert batch.used == 6
    assert ratios[0] == 0.0  # on-policy
    assert max(ratios[3:]) > 0.0
    from fastgrpo.packing import pack

    computed = [r for r in batch.rollouts if not r.failed]
    for packed in pack(computed, max_tokens=10_000):
        assert packed.old_logprob is not None
        torch.testing.assert_close(packed.old_logprob, start.logprobs(packed, 1.0)[0], rtol=0, atol=1e-5)


def test_on_policy_needs_no_old_logprobs(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updater = _updater(tiny_model_dir, _config())
    monkeypatch.setattr(Policy, "logprobs", lambda *_: pytest.fail("an extra forward"))
    batch = _batch()
    assign_advantages(batch.rollouts, {"r": 1.0}, updater.config)
    updater.prepare(batch)
    updater.step(batch, 1e-3)
    assert all(r.old_logprob is None for r in batch.rollouts)


def test_truncated_completions_under_masking(tiny_model_dir: Path) -> None:
    """They keep their place in the group's statistics, but their tokens have no gradient and no denominator."""
    config = _config(mask_truncated_completions=True)
    gradients = []
    for tokens in ([7, 8], [9] * 8):
        updater = _updater(tiny_model_dir, config)
        batch = _batch()
        batch.rollouts[7].token_ids = tokens
        assign_advantages(batch.rollouts, {"r": 1.0}, config)
        assert batch.rollouts[7].advantage > 0
        gradients.append(_gradients(updater, batch)[0])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_lora_step_moves_the_adapters_alone(tiny_model_dir: Path) -> None:
    config = _config(use_peft=True, lora_r=4, beta=0.1)
    updater = _updater(tiny_model_dir, config)
    before = {n: p.detach().clone() for n, p in updater.policy.model.named_parameters()}
    batch = _batch()
    assign_advantages(batch.rollouts, {"r": 1.0}, config)
    updater.prepare(batch)
    _, metrics = _gradients(updater, batch)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)
    changed = {n for n, p in updater.policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_B" in n for n in changed)


def test_bf16_model_with_master_weights_learns(tiny_model_dir: Path) -> None:
    config = _config(dtype="bfloat16")
    updater = _updater(tiny_model_dir, config)
    assert updater.policy.dtype == torch.bfloat16
    batch = _batch()
    assign_advantages(batch.rollouts, {"r": 1.0}, config)
    before = [m.clone() for m in updater.optimizer.masters().values()]
    metrics, applied = updater.step(batch, 1e-2)
    assert applied
    assert metrics["grad_norm"] > 0
    trained = dict(updater.policy.trainable())
    assert len(before) == len(trained)
    for name, old, master in zip(updater.optimizer.names, before, updater.optimizer.masters().values(), strict=True):
        assert master.dtype == torch.float32
        assert not torch.equal(old, master), name
        assert torch.equal(trained[name], master.bfloat16()), name


class TestAdvantages:
    def test_group_normalisation_with_failures(self) -> None:
        batch = _batch()
        assign_advantages(batch.rollouts, {"r": 1.0}, _config())
        a = [r.advantage for r in batch.rollouts]
        std = torch.tensor([1.0, 0, 0, 1]).std().item()
        assert a[:4] == pytest.approx(
            [0.5 / (std + 1e-4), -0.5 / (std + 1e-4)] * 1 + [-0.5 / (std + 1e-4), 0.5 / (std + 1e-4)]
        )
        assert a[5] == 0.0
        assert sum(a[4:8]) == pytest.approx(0.0, abs=1e-6)
        assert a[8:] == [0.0] * 4

    def test_whitening(self) -> None:
        batch = _batch()
        assign_advantages(batch.rollouts, {"r": 1.0}, _config(advantage_whitening=True, scale_rewards="none"))
        a = torch.tensor([r.advantage for r in batch.rollouts if not r.failed])
        assert a.mean().abs() < 1e-6
        assert a.std().item() == pytest.approx(1.0, abs=1e-3)
        assert batch.rollouts[5].advantage == 0.0

    @pytest.mark.parametrize(
        "options", [{"advantage_whitening": True}, {"multi_objective_aggregation": "normalize_then_sum"}]
    )
    def test_dead_groups_stay_exactly_zero(self, options: dict[str, Any]) -> None:
        batch = _batch()
        for i, r in enumerate(batch.rollouts[:8]):
            r.reward = r.rewards["r"] = 0.1 * i**1.5
        assign_advantages(batch.rollouts, {"r": 1.0}, _config(**options))
        assert [r.advantage for r in batch.rollouts[8:]] == [0.0] * 4
        assert all(r.advantage != 0.0 for r in batch.rollouts[:8])

    def test_gdpo_normalises_each_reward_first(self) -> None:
        batch = _batch()
        for i, r in enumerate(batch.rollouts):
            r.rewards = {"r": r.reward, "length": 100.0 * i}
        config = _config(multi_objective_aggregation="normalize_then_sum")
        assign_advantages(batch.rollouts, {"r": 1.0, "length": 0.5}, config)
        valid = [r for r in batch.rollouts if not r.failed]
        parts = []
        for name, weight in (("r", 1.0), ("length", 0.5)):
            column = torch.zeros(len(valid))
            for g in range(3):
                rows = [k for k, r in enumerate(valid) if r.group == g]
                x = torch.tensor([float(valid[k].rewards[name]) for k in rows])
                column[rows] = (x - x.mean()) / (x.std() + 1e-4)
            parts.append(weight * column)
        total = sum(parts)
        expected = (total - total.mean()) / (total.std() + 1e-4)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(torch.tensor([r.advantage for r in valid]), expected, rtol=1e-5, atol=1e-6)

    def test_which_groups_carry_a_signal(self) -> None:
        assert group_signal(_batch().rollouts) == {0: True, 1: True, 2: False}


def test_batch_metrics() -> None:
    metrics = batch_metrics(_batch().rollouts)
    assert metrics["reward"] == pytest.approx(7.5 / 11)
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["completions/max_length"] == 8
    assert metrics["completions/min_length"] == 1
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 12)
