"""Several processes as one run, a GPU each: who does which part of the work, and how the parts come together.

Every process holds the whole model, draws the same prompts, knows the whole scored batch and cuts it into the same
micro-batches. Divided are sampling, scoring, forward and backward passes, and the optimizer: each parameter's gradients
are summed where it is owned, and its new value goes from there to all, so that weights stay equal bit for bit.
`Ranks()` is a run of one process: nothing is divided, and torch.distributed is not touched.

Not done here: models that do not fit one device (sharded weights), several machines.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgrpo.errors import OtherProcessFailed, RunError
from fastgrpo.signals import StopRequested

T = TypeVar("T")

# A process may wait as long as the slowest reward of another takes. One that dies ends the others by its launcher.
_PATIENCE = timedelta(days=2)
_BUCKET = 64 << 20  # numbers of one sum over the processes: 256 MB in fp32


@dataclass
class Ranks:
    """The processes of a run.

    rank, size:    this one's number, and how many there are.
    group:         gloo's group of them, for what is on the CPU; None when alone.
    interruptible: what `together` runs stages in that a signal may cut.
    known:         the exception that `together` raised last: all processes have raised one there.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    interruptible: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    known: BaseException | None = None

    @staticmethod
    def join() -> Ranks:
        """Those that torchrun has started (its environment variables), or this process alone.

        Each takes the GPU of its local number where there are GPUs. Raises RunError when they are fewer than processes.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return Ranks()
        import torch.distributed as dist

        if not dist.is_available():
            raise RunError("several processes need torch.distributed, which this torch was built without")
        if os.environ.get("LOCAL_WORLD_SIZE", str(size)) != str(size):
            raise RunError(f"{size} processes on several machines: a run is of one machine")
        backend = "gloo"
        if torch.cuda.is_available():
            if torch.cuda.device_count() < size:
                raise RunError(f"{size} processes for {torch.cuda.device_count()} GPUs: each needs one of its own")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=_PATIENCE)
        return Ranks(dist.get_rank(), size, dist.new_group(backend="gloo", timeout=_PATIENCE))

    def leave(self) -> None:
        """Part in peace: all have ended."""
        if not self.alone:
            import torch.distributed as dist

            dist.destroy_process_group()

    @property
    def alone(self) -> bool:
        """Is this the only process?"""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Is this the process that writes, and speaks to the user?"""
        return self.rank == 0

    def share(self, items: Sequence[T], *, by_first: bool = False) -> tuple[int, list[T]]:
        """This process's part of a list: where it begins, and the items. In the order of the processes, all of it.

        by_first: the first process has it all, the others nothing.
        """
        sizes = (
            (0, self.size) if by_first and self.first else (self.size,) * 2 if by_first else (self.rank, self.rank + 1)
        )
        begin, end = (len(items) * r // self.size for r in sizes)
        return begin, list(items[begin:end])

    # ----------------------------------------------------------------------------------------- values, on the host

    def gather(self, what: str, value: T) -> list[T]:
        """Everybody's value, in the order of the processes. All must call it, at the same place: `what` is checked.

        Values are pickled: between the processes of one run, which trust one another.
        """
        return [value] if self.alone else [pickle.loads(data) for data in self._gather_bytes(what, pickle.dumps(value))]

    def same(self, what: str, value: Any) -> None:
        """Raises RunError, in every process, where it is not the same in all."""
        values = self.gather(what, value)
        if any(other != values[0] for other in values):
            raise RunError(f"the processes of this run have different {what}: {', '.join(map(str, values))}")

    def together(self, what: str, stage: Callable[[], T], *, cuttable: bool = False) -> list[T]:
        """Run `stage` in every process; what it gave in each. Raised by one, raised by all: nobody waits for ever.

        The first that failed raises its own exception, the others OtherProcessFailed, or StopRequested where a signal
        stopped it. cuttable: signals may stop it anywhere. No collective may be inside.
        """
        if self.alone:
            return [stage()]
        own: BaseException | None = None
        try:
            with self.interruptible() if cuttable else nullcontext():
                data = pickle.dumps((stage(), None))
        except (Exception, StopRequested) as error:
            own = error
            signum = error.exit_code - 128 if isinstance(error, StopRequested) else None
            data = pickle.dumps((None, (signum, f"{type(error).__name__}: {error}")))
        outcomes = [pickle.loads(data) for data in self._gather_bytes(what, data)]
        failed = [(rank, *failure) for rank, (_, failure) in enumerate(outcomes) if failure is not None]
        if failed:
            rank, signum, text = failed[0]
            others = OtherProcessFailed(f"process {rank} failed: {text}") if signum is None else StopRequested(signum)
            self.known = own if own is not None and rank == self.rank else others
            raise self.known
        return [value for value, _ in outcomes]

    def from_first(self, what: str, stage: Callable[[], T]) -> T:
        """What `stage` gives in the first process, which alone runs it, in all of them; likewise what it raises."""
        result: T = self.together(what, stage if self.first else _nothing)[0]
        return result

    def _gather_bytes(self, what: str, data: bytes) -> list[bytes]:
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (what, data), group=self.group)
        if places := {place for place, _ in gathered} - {what}:
            raise OtherProcessFailed(f"the processes have come apart: one is at {places.pop()!r}, this one at {what!r}")
        return [data for _, data in gathered]

    # --------------------------------------------------------------------------------------- tensors, on the device

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum of all processes' ones, in place: the same bits everywhere."""
        if not self.alone:
            import torch.distributed as dist

            self._in_buckets(tensors, dist.all_reduce)

    @torch.no_grad()
    def add_up_at(self, owners: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
        """Each tensor becomes the sum of all processes' ones where it is owned; elsewhere what it holds is lost."""
        if not self.alone:
            import torch.distributed as dist

            for owner, theirs in self._by_owner(owners, tensors):
                self._in_buckets(theirs, partial(dist.reduce, dst=owner))

    @torch.no_grad()
    def copy_from(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its owner's, in place."""
        if not self.alone:
            import torch.distributed as dist

            for owner, theirs in self._by_owner(owners, tensors):
                self._in_buckets(theirs, partial(dist.broadcast, src=owner))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the first process's, in place."""
        self.copy_from([0] * len(tensors), tensors)

    def _by_owner(self, owners: Sequence[int], tensors: Sequence[Tensor | None]) -> Iterator[tuple[int, list[Tensor]]]:
        for owner in range(self.size):
            yield owner, [t for t, o in zip(tensors, owners, strict=True) if o == owner and t is not None]

    def _in_buckets(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
        """A large tensor by itself, where it lies; small ones together."""
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                collective(bucket[0])
                continue
            flat = torch.cat([t.reshape(-1) for t in bucket])
            collective(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))


def owners_of(sizes: Sequence[int], processes: int) -> list[int]:
    """Which process owns each of some things: the largest goes first, to whoever has least."""
    held = [0] * processes
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = held.index(min(held))
        held[owners[i]] += sizes[i]
    return owners


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to so many numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _nothing() -> Any:
    return None
