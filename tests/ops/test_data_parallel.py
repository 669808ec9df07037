"""Two processes, each with a part of the batch, train as one with all of it: DDP, FSDP2, metrics over ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgrpo_kernels import LossConfig, LossOutput, grpo_loss, linear_grpo_loss, linear_logprob

RANKS = 2
LENGTHS = (3, 4, 0, 2, 5)
CONFIG = LossConfig(beta=0.1, entropy_coef=0.05, sampling_correction="sequence_truncate")
ALL = slice(0, len(LENGTHS))
Weight = Callable[[nn.Module], Tensor]


class Batch:
    """Packed completions, and those of them that `sequences` names."""

    def __init__(self, sequences: slice = ALL) -> None:
        g = torch.Generator().manual_seed(0)
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
        first, last = int(bounds[sequences.start]), int(bounds[sequences.stop])
        self.ids, self.target = (torch.randint(19, (sum(LENGTHS),), generator=g)[first:last] for _ in range(2))
        self.advantage = torch.randn(len(LENGTHS), generator=g)[sequences]
        self.cu_seqlens = (bounds[sequences.start : sequences.stop + 1] - first).int()
        names = ("old_logprob", "ref_logprob", "sampling_logprob")
        self.constants = {name: (-3 + torch.randn(sum(LENGTHS), generator=g))[first:last] for name in names}


class Policy(nn.Module):
    """Backbone, head and loss in one forward, as a wrapper must see them."""

    def __init__(self, *, fused: bool = True, weight: Weight = lambda head: head.weight) -> None:  # type: ignore[assignment,return-value]
        super().__init__()
        torch.manual_seed(1)
        self.fused, self.weight = fused, weight
        self.embed, self.body = nn.Embedding(19, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 19, bias=False)
        self.double()

    def forward(self, batch: Batch) -> LossOutput:
        hidden, weight = self.body(self.embed(batch.ids)), self.weight(self.head)
        others: dict[str, Any] = {"config": CONFIG, "num_tokens": sum(LENGTHS), "num_sequences": len(LENGTHS)}
        others |= batch.constants
        if self.fused:
            return linear_grpo_loss(hidden, weight, batch.target, batch.advantage, batch.cu_seqlens, **others)
        logprob, entropy = linear_logprob(hidden, weight, batch.target)
        return grpo_loss(logprob, batch.advantage, batch.cu_seqlens, entropy=entropy, **others)


def whole_batch() -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and means of one process with everything."""
    model = Policy()
    out = model(Batch())
    out.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, LossOutput.reduce([out])


def over_ranks(out: LossOutput) -> dict[str, float]:
    """docs/ops.md, Data parallelism."""
    vector = torch.stack(list(out.metrics.values()))
    gathered = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, vector)
    return LossOutput.reduce([dict(zip(out.metrics, each, strict=True)) for each in gathered])


def assert_gradients(case: str, model: nn.Module, want: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        got = parameter.grad
        assert got is not None, f"{case}: {name}"
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(got, want[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{case}: {n}: {m}")


def check_ddp(mine: slice, want: dict[str, Tensor], means: dict[str, float]) -> None:
    for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
        model = Policy()
        wrapped = DistributedDataParallel(model, **options)  # whose reducer must outlive the backward
        out = wrapped(Batch(mine))
        (out.loss * RANKS).backward()
        assert_gradients(f"DDP {options}", model, want)
        assert over_ranks(out) == pytest.approx(means, rel=1e-12)


def check_ddp_accumulates(parts: list[slice], want: dict[str, Tensor]) -> None:
    model = Policy()
    wrapped = DistributedDataParallel(model)
    for part in parts:
        with nullcontext() if part is parts[-1] else wrapped.no_sync():
            (wrapped(Batch(part)).loss * RANKS).backward()
    assert_gradients("DDP, micro-batches", model, want)


def check_fsdp(mine: slice, want: dict[str, Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (RANKS,))
    gathered: Weight = lambda head: head.weight.full_tensor(grad_placements=[Partial("avg")])  # type: ignore[operator,union-attr] # noqa: E731
    for fused in (True, False):
        for case, model, of_its_own in (
            ("the root's head", Policy(fused=fused), False),
            ("a head of its own", Policy(fused=fused, weight=gathered), True),
        ):
            fully_shard(model.body, mesh=mesh)
            if of_its_own:
                fully_shard(model.head, mesh=mesh)
            fully_shard(model, mesh=mesh)
            (model(Batch(mine)).loss * RANKS).backward()
            assert_gradients(f"FSDP2, {case}, fused={fused}", model, want)


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    want, means = whole_batch()
    for cut in (2, 0):  # in the end a rank without a completion
        mine = slice(0, cut) if rank == 0 else slice(cut, len(LENGTHS))
        check_ddp(mine, want, means)
        check_fsdp(mine, want)
    check_ddp_accumulates([slice(0, 1), slice(1, 2)] if rank == 0 else [slice(2, 3), slice(3, 5)], want)
    dist.destroy_process_group()


def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path / "store"),), nprocs=RANKS)  # type: ignore[attr-defined,no-untyped-call]


def test_frameworks_find_the_tensors_of_an_output() -> None:
    """As DDP with static_graph does, which reduces nothing for an output without any."""
    out = Policy()(Batch())
    leaves, spec = tree_flatten(out)
    assert any(leaf is out.loss for leaf in leaves)
    assert len(leaves) == 3 + len(out.metrics)
    again = tree_unflatten(leaves, spec)
    assert isinstance(again, LossOutput)
    assert LossOutput.reduce([again]) == LossOutput.reduce([out])
