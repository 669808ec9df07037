"""The critic, and one optimizer step of PPO against the same step written naively: every sequence alone, autograd."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import float64_throughout
from torch import Tensor

from fastgrpo.advantages import assign_advantages
from fastgrpo.config import GRPOConfig
from fastgrpo.optim import Optimizer
from fastgrpo.packing import pack
from fastgrpo.policy import Critic, Policy, Reference, load_policy, make_critic
from fastgrpo.records import Prompt, Rollout, RolloutBatch
from fastgrpo.update import Updater


def _batch(seed: int = 0) -> RolloutBatch:
    """Three prompts with two completions each; one failed, one cut short."""
    generator = torch.Generator().manual_seed(seed)
    rewards = [1.0, 0.0, 0.5, math.nan, 0.25, 1.0]
    lengths = [3, 7, 1, 5, 4, 6]
    rollouts = []
    for i, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        prompt = Prompt(i // 2, "", list(range(10, 13 + i // 2)))
        ids = torch.randint(5, 100, (length,), generator=generator).tolist()
        rollouts.append(
            Rollout(prompt, i // 2, ids, -torch.rand(length, generator=generator), i != 4, rewards={"r": reward})
        )
        rollouts[-1].reward = reward
    return RolloutBatch(rollouts, {})


def _config(**options: Any) -> GRPOConfig:
    base = {"algorithm": "ppo", "num_prompts_per_step": 3, "num_generations": 2, "max_completion_length": 8}
    base |= {"max_grad_norm": 0.0, "check_sampling": False}  # the log-probs here are made up
    return GRPOConfig(**{**base, **options})


def _opinionated(critic: Critic) -> Critic:
    """One that has learnt something: its head is not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in critic.value_head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return critic


def _updater(source: Path, config: GRPOConfig) -> Updater:
    policy = load_policy(str(source), None, config)
    reference = Reference(policy) if config.needs_reference else None
    if reference is not None and reference.frozen is not None:
        with torch.no_grad():  # another model, so that there is a KL divergence
            for _, p in reference.frozen.model.named_parameters():
                p.add_(0.02)
    critic = _opinionated(make_critic(policy, config))
    optimizers = [Optimizer(model.trainable(), config) for model in (policy, critic)]
    return Updater(policy, reference, optimizers[0], config, critic, optimizers[1])


def _ready(updater: Updater, batch: RolloutBatch | None = None) -> RolloutBatch:
    batch = batch or _batch()
    assign_advantages(batch.rollouts, {"r": 1.0}, updater.config)
    updater.prepare(batch)
    return batch


def _gradients(updater: Updater, batch: RolloutBatch) -> tuple[list[Tensor], list[Tensor], dict[str, float]]:
    """The gradients the two optimizers are about to apply."""
    seen: dict[int, list[Tensor]] = {}
    models = (updater.policy, updater.critic)
    hooks = []
    for i, optimizer in enumerate((updater.optimizer, updater.critic_optimizer)):
        assert optimizer is not None

        def keep(*_: Any, i: int = i) -> None:
            seen[i] = [p.grad.clone() for _, p in models[i].trainable()]  # type: ignore[union-attr]

        hooks.append(optimizer.torch_optimizer.register_step_pre_hook(keep))
    metrics, applied = updater.step(batch, 1e-3, 1e-3)
    assert applied
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1], metrics


def _alone(model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """States before each completion token, and the log-probs of the tokens, of a sequence by itself."""
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    states = states[len(rollout.prompt.token_ids) - 1 : -1]
    logp = model.lm_head(states).log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)
    return states, logp


def _naive_step(source: Path, config: GRPOConfig, updater: Updater) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Advantages, and the gradients of policy and critic."""
    policy = load_policy(str(source), None, config)
    critic = _opinionated(make_critic(policy, config))
    valid = [r for r in _batch().rollouts if not r.failed]
    advantages, returns, values, logprobs = [], [], [], []
    for r in valid:
        states, _ = _alone(critic.body.model, r)
        _, logp = _alone(policy.model, r)
        v = critic.value_head(states).squeeze(-1)
        assert updater.reference is not None
        assert updater.reference.frozen is not None
        with torch.no_grad():
            rewards = -(config.kl_coef or 0.0) * (logp - _alone(updater.reference.frozen.model, r)[1])
        rewards[-1] += r.reward
        after = torch.cat([v[1:], v.new_zeros(1)]).detach()
        delta = rewards + config.gamma * after - v.detach()
        advantage = torch.zeros_like(delta)
        for t in range(len(delta)):
            for k in range(len(delta) - t):
                advantage[t] += (config.gamma * config.lam) ** k * delta[t + k]
        advantages.append(advantage)
        returns.append(advantage + v.detach())
        values.append(v)
        logprobs.append(logp)
    every = torch.cat(advantages)
    advantages = [(a - every.mean()) / (every.var() + 1e-8).sqrt() for a in advantages]
    ratio = [(logp - logp.detach()).exp() for logp in logprobs]
    policy_loss = -torch.cat([w * a for w, a in zip(ratio, advantages, strict=True)]).mean()
    critic_loss = 0.5 * (torch.cat(values) - torch.cat(returns)).square().mean()
    policy_loss.backward()
    critic_loss.backward()
    return advantages, *([p.grad for _, p in model.trainable()] for model in (policy, critic))  # type: ignore[return-value]


@pytest.mark.parametrize("budget", [12, 10_000])
def test_a_step_is_ppo_written_naively(budget: int, tiny_model_dir: Path) -> None:
    config = _config(kl_coef=0.3, gamma=0.97, max_tokens_per_microbatch=budget)
    updater = _updater(tiny_model_dir, config)
    batch = _ready(updater)
    advantages, *expected = _naive_step(tiny_model_dir, config, updater)
    valid = [r for r in batch.rollouts if not r.failed]
    for r, a in zip(valid, advantages, strict=True):
        torch.testing.assert_close(r.advantages, a, rtol=0, atol=2e-5)
    *found, metrics = _gradients(updater, batch)
    for mine, theirs in zip(found, expected, strict=True):
        scale = max(g.abs().max() for g in theirs)
        for g, e in zip(mine, theirs, strict=True):
            assert (g - e).abs().max() <= 2e-5 * scale
    assert metrics["value_loss"] > 0
    assert batch.metrics["objective/kl"] != 0


@pytest.fixture(params=["shared", "alone"])
def share(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "shared")


def _in_float64(source: Path, share: bool) -> Critic:
    policy = load_policy(str(source), None, GRPOConfig(share_prompts=share))
    return _opinionated(make_critic(Policy(policy.model.double(), policy.tokenizer), _config()))


def test_packed_values_are_those_of_each_sequence_alone(share: bool, tiny_model_dir: Path) -> None:
    rollouts = _batch().rollouts
    with float64_throughout():
        critic = _in_float64(tiny_model_dir, share)
        alone = [critic.value_head(_alone(critic.body.model, r)[0]).squeeze(-1) for r in rollouts]
        for packed in pack(rollouts, max_tokens=25, share=share):
            values = critic.values(packed)
            assert values.dtype == torch.float64
            expected = torch.cat([alone[member] for member in packed.members])
            torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)


def test_the_cut_into_microbatches_changes_nothing(share: bool, tiny_model_dir: Path) -> None:
    """The critic's loss and all its gradients, in float64."""
    results = []
    with float64_throughout():
        for budget in (12, 23, 10_000):
            config = _config(max_tokens_per_microbatch=budget, share_prompts=share)
            critic = _in_float64(tiny_model_dir, share)
            critic.body.unshared = None if share else "told not to"
            updater = Updater(critic.body, None, Optimizer(critic.trainable(), config), config, critic)
            updater.critic_optimizer = Optimizer(critic.trainable(), config)
            rollouts = _batch().rollouts
            generator = torch.Generator().manual_seed(2)
            for r in rollouts:
                r.advantages = torch.zeros(r.num_tokens)
                r.values, r.returns = (torch.randn(r.num_tokens, generator=generator).double() for _ in range(2))
            results.append(_gradients(updater, RolloutBatch(rollouts, {}))[1:])
    whole, figures = results[-1]
    for gradients, metrics in results[:-1]:
        assert metrics["value_loss"] == pytest.approx(figures["value_loss"], rel=1e-12)
        assert metrics["value_clip_ratio"] == figures["value_clip_ratio"]
        for g, e in zip(gradients, whole, strict=True):
            assert (g - e).abs().max() <= 1e-12 * max(x.abs().max() for x in whole)


def test_dead_completions_are_skipped_by_the_policy_and_teach_the_critic(tiny_model_dir: Path) -> None:
    results = []
    for skip in (True, False):
        updater = _updater(tiny_model_dir, _config(skip_zero_advantage=skip))
        batch = _ready(updater)
        assert batch.rollouts[1].advantages is not None
        batch.rollouts[1].advantages.zero_()
        results.append(_gradients(updater, batch))
    (*skipped, some), (*computed, none) = results
    assert some["perf/skipped_token_fraction"] > none["perf/skipped_token_fraction"] > 0
    assert some["value_loss"] == none["value_loss"]
    for mine, theirs in zip(skipped, computed, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-6 * max(g.abs().max() for g in theirs)


def test_dead_completions_have_no_logprobs_and_teach_the_critic_all_the_same(tiny_model_dir: Path) -> None:
    """Without rewards and before the critic has learnt anything, most advantages are exactly 0."""
    updater = _updater(
        tiny_model_dir, _config(num_iterations=2, num_minibatches=2, kl_coef=0.0, lam=1.0, advantage_whitening=False)
    )
    assert updater.critic is not None
    for parameter in updater.critic.value_head.parameters():
        torch.nn.init.zeros_(parameter)
    batch = _batch()
    for r in batch.rollouts[:5]:
        r.reward = 0.0
    batch = _ready(updater, batch)
    assert [r.dead for r in batch.rollouts] == [True] * 5 + [False]
    losses = [updater.step(batch, 1e-3, 1e-3)[0]["value_loss"] for _ in range(4)]
    assert losses[:2] == [0.0, pytest.approx(0.5 * 6 / 10)]  # six tokens of the second minibatch's ten return 1


@pytest.mark.parametrize(("place", "options"), [(3, {}), (4, {"mask_truncated_completions": True})])
def test_what_does_not_train_leaves_no_trace(place: int, options: dict[str, Any], tiny_model_dir: Path) -> None:
    """A failed sample, and one that is cut under masking, may hold any tokens: neither policy nor critic sees them."""
    results = []
    for junk in ([7], list(range(20, 90))):
        updater = _updater(tiny_model_dir, _config(beta=0.1, **options))
        batch = _batch()
        batch.rollouts[place].token_ids = junk
        batch = _ready(updater, batch)
        assert batch.rollouts[place].advantages is None
        results.append((*_gradients(updater, batch)[:2], batch.metrics["explained_variance"]))
    for mine, theirs in zip(results[0][:2], results[1][:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert results[0][2] == results[1][2]


def test_old_values_and_old_logprobs_outlive_the_steps_of_a_batch(tiny_model_dir: Path) -> None:
    updater = _updater(tiny_model_dir, _config(num_iterations=2, num_minibatches=3, max_tokens_per_microbatch=20))
    batch = _ready(updater)
    valid = [r for r in batch.rollouts if not r.failed]
    before = [(r.values, r.old_logprob, r.advantages) for r in valid]
    clipped = [updater.step(batch, 1e-2, 1e-2)[0]["value_clip_ratio"] for _ in range(6)]
    assert clipped[0] == 0.0  # the critic has not moved
    assert max(clipped[3:]) > 0.0
    for r, kept in zip(valid, before, strict=True):
        assert all(a is b for a, b in zip((r.values, r.old_logprob, r.advantages), kept, strict=True))


@pytest.mark.parametrize("which", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_skips_the_step_of_the_one_that_has_it(which: str, tiny_model_dir: Path) -> None:
    updater = _updater(tiny_model_dir, _config())
    batch = _ready(updater)
    assert updater.critic is not None
    models = {"policy": updater.policy, "critic": updater.critic}
    hook = models[which].trainable()[0][1].register_hook(lambda g: g * math.nan)
    before = {name: [p.detach().clone() for _, p in model.trainable()] for name, model in models.items()}
    metrics, applied = updater.step(batch, 1e-2, 1e-2)
    hook.remove()
    assert not applied
    assert math.isnan(metrics["grad_norm" if which == "policy" else "critic/grad_norm"])
    for name, model in models.items():
        same = all(torch.equal(p, old) for (_, p), old in zip(model.trainable(), before[name], strict=True))
        assert same == (name == which)


class TestWhatTheCriticIs:
    def test_it_begins_as_the_policy_and_knows_nothing(self, tiny_untied_model_dir: Path) -> None:
        policy = load_policy(str(tiny_untied_model_dir), None, _config())
        critic = make_critic(policy, _config())
        [batch] = pack(_batch().rollouts, max_tokens=1000)
        assert torch.equal(critic.body.hidden(batch), policy.hidden(batch))
        assert torch.equal(critic.predict(batch), torch.zeros(len(batch.target)))
        # Copies of what trains; the LM head, which it does not use, is the policy's own.
        own = {name: p for name, p in critic.trainable() if not name.startswith("value_head")}
        assert own.keys() == dict(policy.trainable()).keys() - {"lm_head.weight"}
        assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for _, p in policy.trainable()}
        assert critic.body.model.lm_head.weight is policy.model.lm_head.weight

    def test_with_adapters_they_alone_train_and_the_base_is_shared(self, tiny_model_dir: Path) -> None:
        config = _config(use_peft=True, lora_r=4, kl_coef=0.1, gradient_checkpointing=True)
        updater = _updater(tiny_model_dir, config)
        assert updater.critic is not None
        names = {name for name, _ in updater.critic.trainable()}
        assert all("lora_" in name or name.startswith("value_head") for name in names)
        mine, theirs = ({p.data_ptr() for p in m.model.parameters()} for m in (updater.critic.body, updater.policy))
        frozen = {p.data_ptr() for p in updater.policy.model.parameters() if not p.requires_grad}
        assert mine & theirs == frozen
        before = copy.deepcopy(dict(updater.critic.trainable()))
        batch = _ready(updater)
        _gradients(updater, batch)
        _gradients(updater, batch)  # the adapters' first half has a gradient once the second has moved
        assert not [name for name, p in updater.critic.trainable() if torch.equal(p, before[name])]

    def test_another_model(self, tiny_model_dir: Path, tiny_untied_model_dir: Path) -> None:
        policy = load_policy(str(tiny_model_dir), None, _config())
        critic = make_critic(policy, _config(critic_model=str(tiny_untied_model_dir)))
        other = load_policy(str(tiny_untied_model_dir), None, _config())
        [batch] = pack(_batch().rollouts, max_tokens=1000)
        assert torch.equal(critic.body.hidden(batch), other.hidden(batch))
        with pytest.raises(ValueError, match=r"critic_model: .*no such folder"):
            make_critic(policy, _config(critic_model="./nowhere"))

    def test_a_bf16_body_has_an_fp32_head_and_learns(self, tiny_model_dir: Path) -> None:
        updater = _updater(tiny_model_dir, _config(dtype="bfloat16", cliprange_value=None))
        assert updater.critic is not None
        assert updater.critic_optimizer is not None
        assert updater.critic.value_head.weight.dtype == torch.float32
        batch = _ready(updater)
        losses = [updater.step(batch, 1e-3, 1e-2)[0]["value_loss"] for _ in range(8)]
        assert losses[-1] < 0.8 * losses[0]
        assert all(m.dtype == torch.float32 for m in updater.critic_optimizer.masters().values())
        assert len(updater.critic_optimizer.masters()) == len(updater.critic.trainable()) - 2

    def test_weights_of_another_critic_do_not_fit(self, tiny_model_dir: Path) -> None:
        critic = make_critic(load_policy(str(tiny_model_dir), None, _config()), _config())
        saved = dict(critic.trainable())
        saved["value_head.weight"] = torch.nn.Parameter(torch.zeros(1, 3))
        with pytest.raises(ValueError, match=r"another critic than this run's: value_head.weight differ"):
            critic.load(dict(saved))
