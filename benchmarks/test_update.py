"""Forward and backward of one update batch: packed, against the same batch padded to its longest sequence."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import exp, log
from statistics import NormalDist

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from benchmarks.cases import OURS, Case, clipped_loss, relative_error
from benchmarks.small_model import NAME, VOCABULARY, make_model
from fastgrpo.loss import policy_loss
from fastgrpo.packing import denominators, pack
from fastgrpo.policy import Policy
from fastgrpo.records import Prompt, Rollout
from fastgrpo_kernels import LossConfig

_PROMPTS, _GENERATIONS = 4, 4
_MEDIAN, _SIGMA = 48, 0.6  # of the completions' lengths in tokens, and of the lengths' logarithms


@dataclass(frozen=True)
class Inputs:
    """Scored rollouts, and a model without gradients."""

    rollouts: list[Rollout]
    model: Qwen3ForCausalLM


def _lengths() -> list[int]:
    """The lognormal's quantiles: no luck of the draw, and every round has the same work."""
    count = _PROMPTS * _GENERATIONS
    normal = NormalDist(log(_MEDIAN), _SIGMA)
    return [round(exp(normal.inv_cdf((i + 0.5) / count))) for i in range(count)]


def make_rollouts(seed: int) -> list[Rollout]:
    """Random tokens; prompts of 16 to 40 tokens; old log-probs that put the ratios on both sides of the clip range."""
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    lengths = rng.sample(_lengths(), _PROMPTS * _GENERATIONS)
    made = []
    for i, length in enumerate(lengths):
        group = i // _GENERATIONS
        ids = torch.randint(VOCABULARY, (16 + 8 * group + length,), generator=g).tolist()
        prompt = Prompt(group, "", ids[:-length])
        old = -log(VOCABULARY) - 0.3 + 0.3 * torch.randn(length, generator=g)
        advantage = rng.gauss(0, 1)
        rollout = Rollout(prompt, group, ids[-length:], old, finished=True, reward=0.0, advantage=advantage)
        rollout.old_logprob = old
        made.append(rollout)
    return made


@cache
def _model(packed: bool) -> Qwen3ForCausalLM:
    return make_model(packed=packed)


def packed_inputs(seed: int) -> Inputs:
    return _without_gradients(seed, _model(packed=True))


def padded_inputs(seed: int) -> Inputs:
    return _without_gradients(seed, _model(packed=False))


def _without_gradients(seed: int, model: Qwen3ForCausalLM) -> Inputs:
    model.zero_grad(set_to_none=True)
    return Inputs(make_rollouts(seed), model)


def packed(x: Inputs) -> Tensor:
    """As the trainer's update does it, in one micro-batch."""
    policy = Policy(x.model, None)
    whole = denominators(x.rollouts, mask_truncated=False)
    [batch] = pack(x.rollouts, max_tokens=16384)
    output = policy_loss(policy.hidden(batch), policy.head, batch, config=LossConfig(), temperature=1.0, whole=whole)
    output.loss.backward()
    return output.loss.detach()


def padded(x: Inputs) -> Tensor:
    """transformers' stock forward on right-padded rows, logits of all positions."""
    rows = [torch.tensor([*r.prompt.token_ids, *r.token_ids]) for r in x.rollouts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    position = torch.arange(ids.shape[1])
    ends = torch.tensor([len(row) for row in rows])[:, None]
    prompts = torch.tensor([len(r.prompt.token_ids) for r in x.rollouts])[:, None]
    logits = x.model(input_ids=ids, attention_mask=(position < ends).long(), use_cache=False).logits
    logprob = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None]).squeeze(2)
    scored = ((position >= prompts) & (position < ends))[:, 1:]
    loss = _loss(logprob[scored], x.rollouts) / sum(r.num_tokens for r in x.rollouts)
    loss.backward()
    return loss.detach()


def _loss(logprob: Tensor, rollouts: list[Rollout]) -> Tensor:
    """The clipped loss, summed over the rollouts' tokens, which `logprob` [N] holds one rollout after another."""
    old = torch.cat([r.old_logprob for r in rollouts if r.old_logprob is not None])
    advantage = torch.cat([torch.full((r.num_tokens,), r.advantage) for r in rollouts])
    return clipped_loss(logprob, old.to(logprob.dtype), advantage.to(logprob.dtype))


def errors(x: Inputs, loss: Tensor) -> dict[str, float]:
    true_loss, true_gradients = truth()
    gradients = [p.grad for p in x.model.parameters()]
    pairs = zip(gradients, true_gradients, strict=True)
    return {
        "loss": relative_error(loss, true_loss),
        "gradient": max(relative_error(g, true) for g, true in pairs if g is not None),
        "missing_gradients": float(sum(g is None for g in gradients)),
    }


@cache
def truth() -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the rollouts of seed 0, each sequence alone through transformers' model in float64."""
    rollouts = make_rollouts(0)
    model = copy.deepcopy(_model(packed=False)).double()
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for r in rollouts:
        ids = torch.tensor([*r.prompt.token_ids, *r.token_ids])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -r.num_tokens - 1 : -1]
        logprob = torch.log_softmax(logits, -1).gather(1, ids[-r.num_tokens :, None]).squeeze(1)
        part = _loss(logprob, [r]) / sum(r.num_tokens for r in rollouts)
        part.backward()
        total += part.detach()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


def _params() -> tuple[dict[str, object], int]:
    """The size, and the tokens that are not padding."""
    lengths = [len(r.prompt.token_ids) + r.num_tokens for r in make_rollouts(0)]
    params = {
        "model": NAME,
        "prompts": _PROMPTS,
        "n": _GENERATIONS,
        "lengths": f"lognormal({_MEDIAN},{_SIGMA})",
        "padding": round(1 - sum(lengths) / (len(lengths) * max(lengths)), 2),
    }
    return params, sum(lengths)


_PARAMS, _TOKENS = _params()
_PEERS = {"padded": (padded_inputs, padded), OURS: (packed_inputs, packed)}
CASES = [
    Case(
        op="update",
        peer=peer,
        params=_PARAMS,
        tokens=_TOKENS,
        inputs=inputs,
        run=run,
        errors=errors,
        tolerance={"loss": 1e-5, "gradient": 1e-4, "missing_gradients": 0},
        rounds=11,
    )
    for peer, (inputs, run) in _PEERS.items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_update(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
