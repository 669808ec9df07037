"""Rollouts -> PackedBatches: no padding, a shared prompt once, under a token budget, nothing without a gradient.

As few micro-batches as the budget allows, weighed against one another by the work they make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastgrpo.records import PER_TOKEN, Denominators, PackedBatch, Rollout, Work
from fastgrpo_kernels import PackedLayout

_TOKENS = Work(per_token=1.0, per_scored=0.0, attention=())


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
    return [r for r in rollouts if trains(r, mask_truncated=mask_truncated) and not (skip_zero and r.dead)]


def pack(rollouts: list[Rollout], *, max_tokens: int, share: bool = False, work: Work = _TOKENS) -> list[PackedBatch]:
    """All micro-batches of `pack_lazily` at once."""
    return list(pack_lazily(rollouts, max_tokens=max_tokens, share=share, work=work))


def pack_lazily(
    rollouts: list[Rollout],
    *,
    max_tokens: int,
    share: bool = False,
    work: Work = _TOKENS,
    numbers: Sequence[str] = PER_TOKEN,
    part: tuple[int, int] = (0, 1),
) -> Iterator[PackedBatch]:
    """Cut into micro-batches of at most `max_tokens` tokens, on the CPU; one longer sequence goes alone.

    share: completions of the same prompt tokens go together, and their prompt is there once in each micro-batch; they
    are parted, and the prompt repeated, only where they exceed the budget.
    work: what tokens cost; the micro-batches, no more of them than the tokens ask for, are to cost the same.
    numbers: which of the rollouts' numbers per token go along.
    part: which process's micro-batches, of how many: they are cut and dealt out so that all have the same work.
    The same rollouts give the same micro-batches. Raises ValueError, with the numbers, for a budget below 1, a prompt
    or completion without tokens, and log-probs that are not one per token.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    for i, r in enumerate(rollouts):
        _check(i, r)
    families: dict[Any, list[int]] = {}
    for i, r in enumerate(rollouts):
        families.setdefault(tuple(r.prompt.token_ids) if share else i, []).append(i)
    rank, ranks = part
    groups = list(families.values())
    cuts = [_cut(rollouts, groups, max_tokens, max_tokens, work, ranks)]
    if ranks > 1:  # one that is larger than a process's share of all would keep that process busy alone
        prompts = [len(rollouts[family[0]].prompt.token_ids) for family in groups]
        tokens = [r.num_tokens for r in rollouts]
        share_of_all = -(-(sum(tokens) + sum(prompts)) // ranks) + max(tokens, default=0) + max(prompts, default=0)
        cuts.append(_cut(rollouts, groups, min(max_tokens, share_of_all), max_tokens, work, ranks))
    hands = min((_dealt(cut, ranks) for cut in cuts), key=lambda hands: max(_cost(hand) for hand in hands))
    for chosen in hands[rank]:
        yield _pack_one(rollouts, chosen.units, chosen.cost, numbers)


def _check(i: int, rollout: Rollout) -> None:
    tokens = rollout.num_tokens
    if not rollout.prompt.token_ids or not tokens:
        raise ValueError(
            f"rollouts[{i}]: a prompt of {len(rollout.prompt.token_ids)} tokens and a completion of {tokens}, but both "
            "must have one at least"
        )
    for name in PER_TOKEN:
        values = getattr(rollout, name)
        if values is not None and tuple(values.shape) != (tokens,):
            raise ValueError(f"rollouts[{i}].{name}: {list(values.shape)} numbers for {tokens} tokens")


@dataclass(frozen=True)
class _Bin:
    """What becomes a micro-batch: indices of completions, by the prompt they share, and what they cost."""

    units: list[list[int]]
    cost: float


def _cut(
    rollouts: list[Rollout], families: list[list[int]], longest: int, capacity: int, work: Work, ranks: int
) -> list[_Bin]:
    """families: completions of one prompt, kept together up to `longest` tokens."""
    units: list[list[int]] = []
    for family in families:
        room = longest - len(rollouts[family[0]].prompt.token_ids)
        lengths = [rollouts[i].num_tokens for i in family]
        # Where the budget alone parts them, full parts and a rest fill micro-batches better than even ones.
        parts = _first_fit(lengths, room) if longest == capacity else _balanced(lengths, lengths, room, 1)
        units += [[family[k] for k in part] for part in parts]
    prompts = [len(rollouts[unit[0]].prompt.token_ids) for unit in units]
    tokens = [[rollouts[i].num_tokens for i in unit] for unit in units]
    sizes = [prompt + sum(own) for prompt, own in zip(prompts, tokens, strict=True)]
    costs = [work.of(prompt, own) for prompt, own in zip(prompts, tokens, strict=True)]
    return [_Bin([units[u] for u in b], sum(costs[u] for u in b)) for b in _balanced(sizes, costs, capacity, ranks)]


def _dealt(bins: list[_Bin], ranks: int) -> list[list[_Bin]]:
    """Each process's bins, in their order: the costliest is dealt first, to whoever has least."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    held = [0.0] * ranks
    for b in sorted(range(len(bins)), key=lambda b: -bins[b].cost):
        least = min(range(ranks), key=lambda r: held[r])
        hands[least].append(b)
        held[least] += bins[b].cost
    return [[bins[b] for b in sorted(hand)] for hand in hands]


def _cost(bins: list[_Bin]) -> float:
    return sum(b.cost for b in bins)


def _balanced(sizes: list[int], costs: Sequence[float], capacity: int, ranks: int) -> list[list[int]]:
    """Bins as of `_first_fit` that cost about the same: whichever way makes the costliest cheaper.

    No more of them than that, but as many for every process.
    """
    fewest = _first_fit(sizes, capacity)
    balanced = _least_work(sizes, costs, capacity, -(-len(fewest) // ranks) * ranks)
    if balanced is None or _costliest(fewest, costs) <= _costliest(balanced, costs):
        return fewest
    return balanced


def _costliest(bins: list[list[int]], costs: Sequence[float]) -> float:
    return max((sum(costs[i] for i in members) for members in bins), default=0.0)


def _first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices, ascending in each, of sizes up to `capacity` in sum; a larger one has a bin to itself."""
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


def _least_work(sizes: list[int], costs: Sequence[float], capacity: int, count: int) -> list[list[int]] | None:
    """Longest processing time first (Graham 1969) with a capacity. None where an item is left without a place."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [capacity] * count
    load = [0.0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -costs[i]):
        places = [b for b in range(count) if room[b] >= sizes[i] or not bins[b]]
        if not places:
            return None
        place = min(places, key=lambda b: load[b])
        bins[place].append(i)
        room[place] -= sizes[i]
        load[place] += costs[i]
    return [sorted(members) for members in bins if members]


def _pack_one(rollouts: list[Rollout], units: list[list[int]], work: float, numbers: Sequence[str]) -> PackedBatch:
    """units: the completions that share a prompt, or one alone, which is then one plain sequence with its prompt."""
    shared = [[rollouts[i] for i in unit] for unit in units if len(unit) > 1]
    members = [unit[0] for unit in units if len(unit) == 1] + [i for unit in units if len(unit) > 1 for i in unit]
    chosen = [rollouts[i] for i in members]
    alone = chosen[: len(units) - len(shared)]
    prompts = [group[0].prompt.token_ids for group in shared] + [[*r.prompt.token_ids, *r.token_ids] for r in alone]
    ends = list(accumulate(len(ids) for ids in prompts))

    # Per completion: the row that predicts its first token, and the row that token stands in.
    before = [end - r.num_tokens - 1 for end, r in zip(ends[len(shared) :], alone, strict=True)]
    first = [row + 1 for row in before]
    before += [end - 1 for end, group in zip(ends, shared, strict=False) for _ in group]
    first += list(accumulate((r.num_tokens for group in shared for r in group), initial=ends[-1]))[:-1]

    completions = torch.tensor([r.num_tokens for r in chosen])
    cu_seqlens = torch.zeros(len(chosen) + 1, dtype=torch.int32)
    cu_seqlens[1:] = completions.cumsum(0)
    predictor = _ranges(torch.tensor(first) - 1, completions)
    predictor[cu_seqlens[:-1].long()] = torch.tensor(before)
    tokens = [t for ids in prompts for t in ids] + [t for group in shared for r in group for t in r.token_ids]
    per_token = {name: _joined(chosen, name) if name in numbers else None for name in PER_TOKEN}
    advantages = per_token.pop("advantages")
    return PackedBatch(
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        layout=PackedLayout(
            [len(ids) for ids in prompts], [[r.num_tokens for r in group] for group in shared] + [[]] * len(alone)
        ),
        predictor_index=predictor,
        target=torch.tensor([t for r in chosen for t in r.token_ids], dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        advantage=torch.tensor([r.advantage for r in chosen]) if advantages is None else advantages,
        **per_token,
        members=tuple(members),
        work=work,
    )


def _ranges(first: Tensor, lengths: Tensor) -> Tensor:
    """first, first + 1, ... of each length, one range after the other: int64."""
    begins = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (first - begins).repeat_interleave(lengths)


def _joined(rollouts: list[Rollout], name: str) -> Tensor | None:
    """[N], or None when no completion has any. A mixture is a mistake: ValueError."""
    present = [p for p in (getattr(r, name) for r in rollouts) if p is not None]
    if present and len(present) != len(rollouts):
        raise ValueError(f"{name}: {len(present)} of {len(rollouts)} completions have it, and all or none must")
    return torch.cat(present) if present else None


def split_minibatches(rollouts: list[Rollout], count: int) -> list[list[Rollout]]:
    """`count` minibatches of whole groups, as even as they can be, in the order of the groups."""
    groups: dict[int, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    members = list(groups.values())
    bounds = [round(k * len(members) / count) for k in range(count + 1)]
    return [[r for g in members[a:b] for r in g] for a, b in pairwise(bounds)]
