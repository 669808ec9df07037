"""The whole update at GSM8K's lengths, rollouts to gradients, against TRL 1.16's own loss and backward.

TRL: a real GRPOTrainer on the same weights and tokens. Its `_prepare_inputs` pads and splits the batch and computes the
advantages, not timed; its `compute_loss`, which has one path, the chunked LM head, and backward are. On-policy, dapo,
fp32. Ours: everything from the rollouts on, packing and skipping included. Neither takes the optimizer's step.
"""

from __future__ import annotations

import importlib
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, relative_error
from benchmarks.small_model import (
    MEDIUM,
    dapo,
    gradient_errors,
    lognormal_lengths,
    make_model,
    make_rollouts,
    make_tokenizer,
    truth,
)
from fastgrpo.config import GRPOConfig
from fastgrpo.loss import policy_loss
from fastgrpo.packing import denominators, pack, select
from fastgrpo.policy import Policy
from fastgrpo.records import Rollout
from fastgrpo_kernels import LossConfig, group_advantages

_GENERATIONS, _LONGEST = 8, 512
_MEDIAN, _SIGMA = 125, 0.6  # mean 150 before the cap
"""Of the completions' lengths in tokens, and of the lengths' logarithms."""


@dataclass(frozen=True)
class Inputs:
    """Scored rollouts, what computes their gradients (a Policy or a GRPOTrainer), and what TRL made of the rollouts."""

    rollouts: list[Rollout]
    owner: Any
    micro_batches: list[dict[str, Any]]


def _rollouts(seed: int, prompts: int, dead: int) -> list[Rollout]:
    """Prompts of 60 to 140 tokens; rewards of 0 and 1, in the first `dead` groups all the same."""
    rng = random.Random(seed)
    count = prompts * _GENERATIONS
    lengths = rng.sample(lognormal_lengths(count, _MEDIAN, _SIGMA, _LONGEST), count)
    groups = [lengths[i : i + _GENERATIONS] for i in range(0, count, _GENERATIONS)]
    rollouts = make_rollouts(MEDIUM, [60 + 80 * i // (prompts - 1) for i in range(prompts)], groups, seed)
    for i, r in enumerate(rollouts):
        r.reward = float(r.group % 2 if r.group < dead else i % _GENERATIONS <= r.group % (_GENERATIONS - 1))
    rewards, index = torch.tensor([r.reward for r in rollouts]), torch.tensor([r.group for r in rollouts])
    for r, advantage in zip(rollouts, group_advantages(rewards, index).tolist(), strict=True):
        r.advantage = advantage
    return rollouts


@cache
def _policy() -> Policy:
    policy = Policy(make_model(MEDIUM, packed=True), None)
    policy.self_check()
    return policy


def our_inputs(seed: int, prompts: int, dead: int) -> Inputs:
    policy = _policy()
    policy.model.zero_grad(set_to_none=True)
    return Inputs(_rollouts(seed, prompts, dead), policy, [])


def update(x: Inputs) -> Tensor:
    """As the trainer's update does it."""
    whole = denominators(x.rollouts, mask_truncated=False)
    live = select(x.rollouts, mask_truncated=False, skip_zero=True)
    total = torch.zeros(())
    for batch in pack(live, max_tokens=GRPOConfig.max_tokens_per_microbatch, share=x.owner.shares):
        hidden = x.owner.hidden(batch)
        output = policy_loss(hidden, x.owner.head, batch, config=LossConfig(), temperature=1.0, whole=whole)
        output.loss.backward()
        total += output.loss.detach()
    return total


def _reward(score: list[float], **_: Any) -> list[float]:
    return score


@cache
def _trainer(prompts: int, batch_size: int) -> Any:
    """TRL's defaults but for what is named; its bf16 on a CPU is slower, and not exact."""
    from datasets import Dataset

    package: Any = importlib.import_module("trl")
    config = package.GRPOConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "fastgrpo-benchmark-trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        loss_type="dapo",
        num_generations=_GENERATIONS,
        max_completion_length=_LONGEST,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=prompts * _GENERATIONS // batch_size,
        gradient_checkpointing=False,
    )
    trainer = package.GRPOTrainer(
        make_model(MEDIUM, packed=False),
        _reward,
        config,
        Dataset.from_dict({"prompt": ["0"], "score": [0.0]}),
        processing_class=make_tokenizer(MEDIUM, eos_token="1", pad_token="0"),
    )
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def trl_inputs(seed: int, prompts: int, dead: int, batch_size: int | None) -> Inputs:
    """What TRL makes of the rollouts; only the sampling itself is replaced."""
    rollouts = _rollouts(seed, prompts, dead)
    trainer = _trainer(prompts, batch_size or len(rollouts))
    trainer.model.zero_grad(set_to_none=True)

    def generate(_: list[Any]) -> tuple[Any, ...]:
        prompts, completions = [r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts]
        return prompts, completions, None, [""] * len(rollouts), None, {}, None, None

    rows = [{"prompt": "0", "score": r.reward} for r in rollouts]
    with mock.patch.object(trainer, "_generate", generate):
        micro_batches = []
        for step in range(trainer.args.steps_per_generation):
            trainer._step = step
            micro_batches.append(dict(trainer._prepare_inputs(rows)))
    return Inputs(rollouts, trainer, micro_batches)


def trl(x: Inputs) -> Tensor:
    """The losses of the micro-batches add up: dapo's denominator is the whole batch's."""
    total = torch.zeros(())
    for batch in x.micro_batches:
        loss = x.owner.compute_loss(x.owner.model, batch)
        loss.backward()
        total += loss.detach()
    return total


def errors(x: Inputs, loss: Tensor, dead: int) -> dict[str, float]:
    true_loss, true_gradients = _truth(len(x.rollouts) // _GENERATIONS, dead)
    scale = 1 / sum(r.num_tokens for r in x.rollouts)
    found = gradient_errors(x.owner.model, true_gradients, scale)
    return {"loss": relative_error(loss, scale * true_loss), **found}


@cache
def _truth(prompts: int, dead: int) -> tuple[Tensor, list[Tensor]]:
    return truth(MEDIUM, [r for r in _rollouts(0, prompts, dead) if r.advantage], dapo)


def _cases(prompts: int, dead: int, peers: dict[str, dict[str, Any]]) -> list[Case]:
    """The rows of one size: TRL in these configurations, then ours."""
    rollouts = _rollouts(0, prompts, dead)
    own = sum(r.num_tokens + len(r.prompt.token_ids) for r in rollouts)
    padded = len(rollouts) * (max(r.num_tokens for r in rollouts) + max(len(r.prompt.token_ids) for r in rollouts))
    params = {
        "model": MEDIUM.name,
        "prompts": prompts,
        "n": _GENERATIONS,
        "lengths": f"lognormal({_MEDIAN},{_SIGMA},{_LONGEST})",
        "padding": round(1 - own / padded, 2),
        "dead": dead,
    }
    size: dict[str, Any] = {"prompts": prompts, "dead": dead}
    runs: dict[str, tuple[Callable[[int], Inputs], Callable[[Inputs], Tensor]]] = {
        name: (partial(trl_inputs, **size, **options), trl) for name, options in peers.items()
    }
    runs[OURS] = (partial(our_inputs, **size), update)
    return [
        Case(
            op="update_trl",
            peer=peer,
            params=params,
            tokens=own,
            inputs=inputs,
            run=run,
            errors=partial(errors, dead=dead),
            tolerance={"loss": 1e-5, "gradient": 1e-4, "missing_gradients": 0},
            rounds=3 if peer == OURS else 1,
            needs=None if peer == OURS else "trl",
            weighed=False,  # a run of TRL takes up to a minute
        )
        for peer, (inputs, run) in runs.items()
    ]


# Micro-batches: all sequences in one, or a prompt's number of them.
_WHOLE, _EIGHTS = {"batch_size": None}, {"batch_size": _GENERATIONS}
CASES = _cases(2, 0, {"trl": _EIGHTS})
MORE = [
    *_cases(2, 1, {"trl": _EIGHTS}),
    *_cases(4, 0, {"trl-whole": _WHOLE, "trl": _EIGHTS}),
    *_cases(8, 0, {"trl": _EIGHTS}),
    *_cases(8, 4, {"trl": _EIGHTS}),
]


def test_update_trl(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
