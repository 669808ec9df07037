"""Forward and backward of one update batch: packed, against the same batch padded to its longest sequence."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from benchmarks.cases import OURS, Case, clipped_loss, relative_error
from benchmarks.small_model import (
    MEDIUM,
    SMALL,
    Shape,
    dapo,
    gradient_errors,
    lognormal_lengths,
    make_model,
    make_rollouts,
    truth,
)
from fastgrpo.loss import policy_loss
from fastgrpo.packing import denominators, pack
from fastgrpo.policy import Policy
from fastgrpo.records import Rollout
from fastgrpo_kernels import LossConfig

_GENERATIONS = 4
_MEDIAN, _SIGMA = 48, 0.6  # of the completions' lengths in tokens, and of the lengths' logarithms


@dataclass(frozen=True)
class Inputs:
    """Scored rollouts, and a model without gradients."""

    rollouts: list[Rollout]
    model: Qwen3ForCausalLM


def _rollouts(seed: int, prompts: int, shape: Shape) -> list[Rollout]:
    """Prompts of 16 to 40 tokens, old log-probs on both sides of the clip range, lengths in an order of the seed's."""
    count = prompts * _GENERATIONS
    lengths = random.Random(seed).sample(lognormal_lengths(count, _MEDIAN, _SIGMA), count)
    groups = [lengths[i : i + _GENERATIONS] for i in range(0, count, _GENERATIONS)]
    return make_rollouts(shape, [16 + 8 * (i % 4) for i in range(prompts)], groups, seed, on_policy=False)


@cache
def _model(packed: bool, shape: Shape) -> Qwen3ForCausalLM:
    return make_model(shape, packed=packed)


def make_inputs(seed: int, prompts: int, packed: bool, shape: Shape) -> Inputs:
    model = _model(packed, shape)
    model.zero_grad(set_to_none=True)
    return Inputs(_rollouts(seed, prompts, shape), model)


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
    old = torch.cat([r.old_logprob for r in x.rollouts if r.old_logprob is not None])
    advantage = torch.cat([torch.full((r.num_tokens,), r.advantage) for r in x.rollouts])
    loss = clipped_loss(logprob[scored], old, advantage) / sum(r.num_tokens for r in x.rollouts)
    loss.backward()
    return loss.detach()


def errors(x: Inputs, loss: Tensor, shape: Shape) -> dict[str, float]:
    true_loss, true_gradients = _truth(len(x.rollouts) // _GENERATIONS, shape)
    scale = 1 / sum(r.num_tokens for r in x.rollouts)
    return {"loss": relative_error(loss, scale * true_loss), **gradient_errors(x.model, true_gradients, scale)}


@cache
def _truth(prompts: int, shape: Shape) -> tuple[Tensor, list[Tensor]]:
    return truth(shape, _rollouts(0, prompts, shape), dapo)


def cases(prompts: int, shape: Shape = SMALL, rounds: int = 5) -> list[Case]:
    """`tokens` counts those that are not padding."""
    lengths = [len(r.prompt.token_ids) + r.num_tokens for r in _rollouts(0, prompts, shape)]
    params = {
        "model": shape.name,
        "prompts": prompts,
        "n": _GENERATIONS,
        "lengths": f"lognormal({_MEDIAN},{_SIGMA})",
        "padding": round(1 - sum(lengths) / (len(lengths) * max(lengths)), 2),
    }
    return [
        Case(
            op="update",
            peer=peer,
            params=params,
            tokens=sum(lengths),
            inputs=partial(make_inputs, prompts=prompts, packed=peer == OURS, shape=shape),
            run=run,
            errors=partial(errors, shape=shape),
            tolerance={"loss": 1e-5, "gradient": 1e-4, "missing_gradients": 0},
            rounds=rounds,
        )
        for peer, run in (("padded", padded), (OURS, packed))
    ]


CASES = [*cases(prompts=4), *cases(prompts=4, shape=MEDIUM, rounds=3)]


def test_update(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
