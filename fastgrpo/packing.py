"""Rollouts -> PackedBatches: no padding, a shared prompt once, under a token budget, nothing without a gradient.

Micro-batches are filled by tokens, not balanced by their work in attention.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

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


def pack(rollouts: list[Rollout], *, max_tokens: int, share: bool = False) -> list[PackedBatch]:
    """Cut into micro-batches of at most `max_tokens` tokens, on the CPU; one longer sequence goes alone.

    share: completions of the same prompt tokens go together, and their prompt is there once in each micro-batch; they
    are parted, and the prompt repeated, only where they exceed the budget.
    First fit by falling size: few micro-batches, and the same ones for the same rollouts.
    """
    prompts = [len(r.prompt.token_ids) for r in rollouts]
    families: dict[Any, list[int]] = {}
    for i, r in enumerate(rollouts):
        families.setdefault(tuple(r.prompt.token_ids) if share else i, []).append(i)
    units: list[list[int]] = []
    for family in families.values():
        parts = _first_fit([rollouts[i].num_tokens for i in family], max_tokens - prompts[family[0]])
        units += [[family[k] for k in part] for part in parts]
    sizes = [prompts[unit[0]] + sum(rollouts[i].num_tokens for i in unit) for unit in units]
    return [_pack_one(rollouts, [units[u] for u in chosen]) for chosen in _first_fit(sizes, max_tokens)]


def _first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices, ascending in each, whose sizes sum to at most `capacity`; a larger one has a bin to itself."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = next((b for b, free in enumerate(room) if free >= sizes[i]), None)
        if fits is None:
            bins.append([])
            room.append(capacity)
            fits = len(bins) - 1
        bins[fits].append(i)
        room[fits] -= sizes[i]
    return [sorted(members) for members in bins]


def _pack_one(rollouts: list[Rollout], units: list[list[int]]) -> PackedBatch:
    """units: the completions that share a prompt, or one alone, which is then one plain sequence with its prompt."""
    shared = [[rollouts[i] for i in unit] for unit in units if len(unit) > 1]
    members = [unit[0] for unit in units if len(unit) == 1] + [i for unit in units if len(unit) > 1 for i in unit]
    chosen = [rollouts[i] for i in members]
    alone = chosen[: len(units) - len(shared)]
    prompts = [group[0].prompt.token_ids for group in shared] + [[*r.prompt.token_ids, *r.token_ids] for r in alone]
    prompt_lengths = [len(ids) for ids in prompts]
    ends = list(accumulate(prompt_lengths))

    # Per completion: the row that predicts its first token, and the row that token stands in.
    before = [end - r.num_tokens - 1 for end, r in zip(ends[len(shared) :], alone, strict=True)]
    first = [row + 1 for row in before]
    sizes = [r.num_tokens for group in shared for r in group]
    before += [end - 1 for end, group in zip(ends, shared, strict=False) for _ in group]
    first += list(accumulate(sizes, initial=ends[-1]))[:-1]

    completions = torch.tensor([r.num_tokens for r in chosen])
    cu_seqlens = torch.zeros(len(chosen) + 1, dtype=torch.int32)
    cu_seqlens[1:] = completions.cumsum(0)
    predictor = _ranges(torch.tensor(first) - 1, completions)
    written = completions > 0
    predictor[cu_seqlens[:-1][written].long()] = torch.tensor(before)[written]
    starts = [0] * len(prompts) + [len(group[0].prompt.token_ids) for group in shared for _ in group]
    tokens = [t for ids in prompts for t in ids] + [t for group in shared for r in group for t in r.token_ids]
    return PackedBatch(
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        position_ids=_ranges(torch.tensor(starts), torch.tensor([*prompt_lengths, *sizes])),
        prompt_lengths=tuple(prompt_lengths),
        completion_lengths=(*(tuple(r.num_tokens for r in group) for group in shared), *[()] * len(alone)),
        predictor_index=predictor,
        target=torch.tensor([t for r in chosen for t in r.token_ids], dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        advantage=torch.tensor([r.advantage for r in chosen]),
        old_logprob=_joined([r.old_logprob for r in chosen]),
        ref_logprob=_joined([r.ref_logprob for r in chosen]),
        sampling_logprob=_joined([r.sampling_logprob for r in chosen]),
        members=tuple(members),
    )


def _ranges(first: Tensor, lengths: Tensor) -> Tensor:
    """first, first + 1, ... of each length, one range after the other: int64."""
    begins = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (first - begins).repeat_interleave(lengths)


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
