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
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.errors import OtherProcessFailed, RunError
from fastgrpo.signals import StopRequested

T = TypeVar("T")

# A process may wait as long as the slowest reward of another takes. One that dies ends the others by its launcher.
_PATIENCE = timedelta(days=2)
_BUCKET = 64 << 20  # numbers of one sum over the processes: 256 MB in fp32
_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Ranks:
    """The processes of a run.

    rank, size:    this one's number, and how many there are.
    group:         gloo's group of them, for what is on the CPU; None when alone.
    devices:       the group for what is on their devices.
    interruptible: what `together` runs stages in that a signal may cut.
    known:         the exception that `together` or `same` raised last: all processes have raised one there.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    devices: Any = None
    interruptible: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    known: BaseException | None = None

    @staticmethod
    def join(*, cpu: bool = False) -> Ranks:
        """Those that torchrun has started (its environment variables), or this process alone.

        Each takes the GPU of its local number where there are GPUs; or, where it sees one alone, that one.
        cpu: they work on the CPU, though there be GPUs.
        Raises RunError when two have the same GPU, are on several machines, or cannot find one another.
        """
        if not dist.is_available():
            if _size() == 1:
                return Ranks()
            raise RunError("several processes need torch.distributed, which this torch was built without")
        joined = dist.is_initialized()  # by the caller's script
        size = dist.get_world_size() if joined else _size()
        if size == 1:
            return Ranks()
        if os.environ.get("LOCAL_WORLD_SIZE", str(size)) != str(size):
            raise RunError(f"{size} processes on several machines: a run is of one machine")
        if not joined and (missing := [name for name in _RENDEZVOUS if not os.environ.get(name)]):
            raise RunError(f"WORLD_SIZE={size} without {', '.join(missing)}: start with torchrun, or unset WORLD_SIZE")
        backend, gpu = "gloo", None
        if torch.cuda.is_available() and not cpu:
            local = os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or dist.get_rank()
            torch.cuda.set_device(int(local) % torch.cuda.device_count())
            gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            backend = "cpu:gloo,cuda:nccl"
        if not joined:
            dist.init_process_group(backend, timeout=_PATIENCE)
        # Groups of our own: the script's may have another backend, and less patience.
        groups = [dist.new_group(backend=name, timeout=_PATIENCE) for name in ("gloo", backend)]
        ranks = Ranks(dist.get_rank(), size, *groups)
        places = ranks.gather("places", (socket.gethostname(), gpu))
        if "LOCAL_WORLD_SIZE" not in os.environ and len({host for host, _ in places}) > 1:
            raise RunError(f"{size} processes on several machines: a run is of one machine")
        if gpu is not None and len(set(places)) < size:
            raise RunError(f"{size} processes for {len(set(places))} GPUs: each needs one of its own")
        return ranks

    def leave(self) -> None:
        """Part in peace: when all have ended. A launcher ends the others when one has left with an exit code."""
        if not self.alone:
            with suppress(OtherProcessFailed):  # one that is gone has ended
                self.gather("the end", None)
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
        if by_first:
            return (0, list(items)) if self.first else (len(items), [])
        begin, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return begin, list(items[begin:end])

    # ----------------------------------------------------------------------------------------- values, on the host

    def gather(self, what: str, value: T) -> list[T]:
        """Everybody's value, in the order of the processes. All must call it, at the same place: `what` is checked.

        Values are pickled: between the processes of one run, which trust one another.
        """
        return [value] if self.alone else [pickle.loads(data) for data in self._gather_bytes(what, pickle.dumps(value))]

    def same(self, what: str, find: Callable[[], Any]) -> None:
        """Raises RunError, in every process, where `find` does not give the same in all."""
        if self.alone:
            return
        values = self.gather(what, find())
        if any(other != values[0] for other in values):
            self.known = RunError(f"the processes of this run have different {what}: {', '.join(map(str, values))}")
            raise self.known

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
        gathered: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(gathered, (what, data), group=self.group)
        except RuntimeError as error:
            raise OtherProcessFailed(f"another process has ended; this one waited for it at {what!r}") from error
        if places := {place for place, _ in gathered} - {what}:
            raise OtherProcessFailed(f"the processes have come apart: one is at {places.pop()!r}, this one at {what!r}")
        return [data for _, data in gathered]

    # --------------------------------------------------------------------------------------- tensors, on the device

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum of all processes' ones, in place: the same bits everywhere."""
        if not self.alone:
            self._in_buckets(tensors, partial(dist.all_reduce, group=self.devices))

    @torch.no_grad()
    def add_up_at(self, owners: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
        """Each tensor becomes the sum of all processes' ones where it is owned; elsewhere what it holds is lost."""
        if not self.alone:
            for owner, theirs in self._by_owner(owners, tensors):
                self._in_buckets(theirs, partial(dist.reduce, dst=owner, group=self.devices))

    @torch.no_grad()
    def copy_from(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its owner's, in place."""
        if not self.alone:
            for owner, theirs in self._by_owner(owners, tensors):
                self._in_buckets(theirs, partial(dist.broadcast, src=owner, group=self.devices))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the first process's, in place."""
        self.copy_from([0] * len(tensors), tensors)

    def make_alike(self, policy: Any) -> None:
        """A policy's weights become the first process's; where one finds that prompts cannot be shared, none does."""
        self.copy_from_first([*policy.model.parameters(), *policy.model.buffers()])
        policy.unshared = next(filter(None, self.gather("sharing", policy.unshared)), None)

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


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def _nothing() -> Any:
    return None
