"""Where keys and values lie: slabs of about one size, cut into places of a size class; classes pass them on.

A sequence is stored once, in a place of the smallest class that holds it; when it outgrows that, it moves to the next.
The last sequence of a class moves into the gap that one which leaves would make: a class is always a dense prefix, so
attention reads views. What is allocated never exceeds what the sequences alive at once needed, rounded up to slabs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# The smallest class, in tokens: fewer classes are fewer calls of attention.
SMALLEST = 64
# Tokens of a slab, unless fewer will do or one sequence is longer.
_SLAB_TOKENS = 8192


@dataclass(eq=False)
class Sequence:
    """Keys and values of `length` tokens, at `place` of the shelf; the scheduler's rows and prompts are sequences."""

    length: int = 0
    shelf: Shelf | None = None
    place: int = -1


@dataclass(frozen=True)
class KeyShape:
    """What is kept for one token: `layers` times keys and values of `heads` times `size` numbers."""

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def numbers(self) -> int:
        """Per token."""
        return self.layers * 2 * self.heads * self.size


class SlabPool:
    """Flat slabs, kept for the next who asks for one of that size once they were given back."""

    def __init__(self, shape: KeyShape) -> None:
        self.shape = shape
        self.tokens = 0  # of all slabs there are
        self._free: dict[int, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Of every slab there is, used or not."""
        return self.tokens * self.shape.numbers * self.shape.dtype.itemsize

    def take(self, tokens: int) -> Tensor:
        """A slab for so many tokens. Zeros at first: what is masked later must be finite."""
        numbers = tokens * self.shape.numbers
        if self._free.get(numbers):
            return self._free[numbers].pop()
        self.tokens += tokens
        return torch.zeros(numbers, dtype=self.shape.dtype, device=self.shape.device)

    def give(self, slab: Tensor) -> None:
        """Take a slab back."""
        self._free.setdefault(len(slab), []).append(slab)


class Shelf:
    """The sequences of one class, `most` at once: place i is row i % per_slab of slab i // per_slab.

    slabs: each [layers, 2, per_slab, heads, capacity, size], keys at 0 and values at 1.
    """

    def __init__(self, pool: SlabPool, capacity: int, most: int) -> None:
        self.pool = pool
        self.capacity = capacity
        self.per_slab = max(1, min(most, _SLAB_TOKENS // capacity))
        self.members: list[Sequence] = []
        self.slabs: list[Tensor] = []

    def where(self, place: int) -> Tensor:
        """[layers, 2, heads, capacity, size] of one place."""
        return self.slabs[place // self.per_slab][:, :, place % self.per_slab]

    def put(self, sequence: Sequence) -> None:
        """Give the sequence the next place; what it held elsewhere comes along."""
        if len(self.members) == len(self.slabs) * self.per_slab:
            shape = self.pool.shape
            sizes = (shape.layers, 2, self.per_slab, shape.heads, self.capacity, shape.size)
            self.slabs.append(self.pool.take(self.per_slab * self.capacity).view(sizes))
        place = len(self.members)
        self.members.append(sequence)
        if sequence.shelf is not None:
            held = sequence.shelf.where(sequence.place)[..., : sequence.length, :]
            self.where(place)[..., : sequence.length, :].copy_(held)
            sequence.shelf.remove(sequence)
        sequence.shelf, sequence.place = self, place

    def remove(self, sequence: Sequence) -> None:
        """Let the sequence go; the last one takes its place."""
        last = self.members.pop()
        if last is not sequence:
            self.where(sequence.place)[..., : last.length, :].copy_(self.where(last.place)[..., : last.length, :])
            self.members[sequence.place] = last
            last.place = sequence.place
        sequence.shelf, sequence.place = None, -1
        if len(self.members) <= (len(self.slabs) - 1) * self.per_slab:
            self.pool.give(self.slabs.pop().flatten())

    def parts(self) -> Iterator[tuple[Tensor, list[Sequence]]]:
        """Each slab with the sequences in it, in the order of their places."""
        for i, slab in enumerate(self.slabs):
            yield slab, self.members[i * self.per_slab : (i + 1) * self.per_slab]


class Shelves:
    """One shelf per class: SMALLEST, twice that, ... up to the longest sequence; `most` of them at once."""

    def __init__(self, pool: SlabPool, most: int, longest: int) -> None:
        capacities = []
        capacity = SMALLEST
        while capacity < longest:
            capacities.append(capacity)
            capacity *= 2
        self.shelves = [Shelf(pool, c, most) for c in [*capacities, longest]]

    def add(self, sequence: Sequence, length: int) -> None:
        """A place for `length` tokens."""
        self._fitting(length).put(sequence)

    def grow(self, sequences: Iterable[Sequence], by: int) -> None:
        """Make sure that each can take `by` more tokens, and count them."""
        for sequence in sequences:
            assert sequence.shelf is not None
            if sequence.length + by > sequence.shelf.capacity:
                self._fitting(sequence.length + by).put(sequence)
            sequence.length += by

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Let these go, the last places first: so the fewest others move."""
        for sequence in sorted(sequences, key=lambda s: -s.place):
            assert sequence.shelf is not None
            sequence.shelf.remove(sequence)

    def parts(self) -> Iterator[tuple[Tensor, list[Sequence]]]:
        """Every slab in use with its sequences; this order of the sequences is the order of the batch."""
        for shelf in self.shelves:
            yield from shelf.parts()

    def _fitting(self, length: int) -> Shelf:
        return next(shelf for shelf in self.shelves if length <= shelf.capacity)
