"""Rollouts -> PackedBatches: no padding, under a token budget, and without the sequences that carry no gradient."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.records import Denominators, PackedBatch, Rollout


def trains(rollout: Rollout, *, mask_truncated: bool) -> bool:
    """Do the completion's tokens count: not of a failed sample, not truncated under masking, not empty."""
    return not (rollout.failed or (mask_truncated and not rollout.finished)) and rollout.num_tokens > 0


def denominators(rollouts: list[Rollout], *, mask_truncated: bool) -> Denominators:
    """Counted over the whole update batch, before anything is skipped."""
    return Denominators(
        num_sequences=sum(not r.failed for r in rollouts),
        num_tokens=sum(r.num_tokens for r in rollouts if trains(r, mask_truncated=mask_truncated)),
    )


def select(rollouts: list[Rollout], *, mask_truncated: bool, skip_zero: bool) -> list[Rollout]:
    """The completions that must be computed. `skip_zero` drops those of zero advantage; only when that is exact."""
    return [r for r in rollouts if trains(r, mask_truncated=mask_truncated) and not (skip_zero and r.advantage == 0.0)]


def pack(rollouts: list[Rollout], *, max_tokens: int) -> list[PackedBatch]:
    """Cut into micro-batches of at most `max_tokens` tokens, on the CPU; one longer sequence goes alone.

    First fit by falling length: few micro-batches, and the same ones for the same rollouts.
    """
    lengths = [len(r.prompt.token_ids) + r.num_tokens for r in rollouts]
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(rollouts)), key=lambda i: -lengths[i]):
        fits = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if fits is None:
            bins.append([])
            room.append(max_tokens)
            fits = len(bins) - 1
        bins[fits].append(i)
        room[fits] -= lengths[i]
    return [_pack_one(rollouts, sorted(members)) for members in bins]


def _pack_one(rollouts: list[Rollout], members: list[int]) -> PackedBatch:
    chosen = [rollouts[i] for i in members]
    prompts = torch.tensor([len(r.prompt.token_ids) for r in chosen])
    completions = torch.tensor([r.num_tokens for r in chosen])
    lengths = prompts + completions
    starts = lengths.cumsum(0) - lengths
    cu_seqlens = torch.zeros(len(chosen) + 1, dtype=torch.int32)
    cu_seqlens[1:] = completions.cumsum(0)
    total = int(lengths.sum())
    tokens = [t for r in chosen for t in (*r.prompt.token_ids, *r.token_ids)]
    # Completion token k of a sequence is predicted by the row before it: its start + prompt + k - 1.
    first = (starts + prompts - 1).repeat_interleave(completions)
    within = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].long().repeat_interleave(completions)
    predictor = first + within
    input_ids = torch.tensor(tokens, dtype=torch.int64)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.arange(total) - starts.repeat_interleave(lengths),
        lengths=tuple(lengths.tolist()),
        predictor_index=predictor,
        target=input_ids[predictor + 1],
        cu_seqlens=cu_seqlens,
        advantage=torch.tensor([r.advantage for r in chosen]),
        old_logprob=_joined([r.old_logprob for r in chosen]),
        ref_logprob=_joined([r.ref_logprob for r in chosen]),
        sampling_logprob=_joined([r.sampling_logprob for r in chosen]),
        members=tuple(members),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """[N], or None when no sequence has any. A mixture is a mistake: ValueError."""
    present = [p for p in parts if p is not None]
    if present and len(present) != len(parts):
        raise ValueError(f"{len(present)} of {len(parts)} completions have log-probs: all or none must")
    return torch.cat(present) if present else None


def split_minibatches(rollouts: list[Rollout], count: int) -> list[list[Rollout]]:
    """`count` minibatches of whole groups, as even as they can be, in the order of the groups."""
    groups: dict[int, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    members = list(groups.values())
    bounds = [round(k * len(members) / count) for k in range(count + 1)]
    return [[r for g in members[a:b] for r in g] for a, b in pairwise(bounds)]
