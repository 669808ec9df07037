"""`into_main_grad`: gradients added up in fp32 beside the weight; and the weights that a linear op refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels import LoRADelta, LossConfig, linear_grpo_loss, linear_logprob

from .cases import relative_error

CU = torch.tensor([0, 4, 6, 11], dtype=torch.int32)
SEQUENCE = LossConfig(importance_sampling_level="sequence")


def make(seed: int = 0) -> tuple[Tensor, Tensor]:
    """hidden [11, 6], target [11]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(11, 6, generator=g), torch.randint(0, 19, (11,), generator=g)


def parameter(dtype: torch.dtype = torch.float32) -> Any:
    return torch.nn.Parameter(torch.randn(19, 6, generator=torch.Generator().manual_seed(9)).to(dtype))


def by_logprob(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    logprob, entropy = linear_logprob(hidden, weight, target, chunk_size=4, **options)
    return (logprob * torch.linspace(-1, 2, 11)).sum() - 0.3 * entropy.sum()


def by_loss(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    advantage = torch.tensor([1.0, -0.5, 2.0])
    return linear_grpo_loss(hidden, weight, target, advantage, CU, chunk_size=4, **options).loss


def by_sequences(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    return by_loss(hidden, weight, target, config=SEQUENCE, **options)


every_loss = pytest.mark.parametrize("loss", [by_logprob, by_loss, by_sequences])
Loss = Callable[..., Tensor]


def sum_of_gradients(loss: Loss, weight: Tensor, scales: list[float]) -> Tensor:
    """In float64, of one micro-batch after the other."""
    total = torch.zeros(19, 6, dtype=torch.float64)
    for seed, scale in enumerate(scales):
        w = weight.detach().float().requires_grad_()
        hidden, target = make(seed)
        total += scale * torch.autograd.grad(loss(hidden.to(weight.dtype), w, target), w)[0].double()
    return total


@every_loss
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_fp32(loss: Loss, compiled: bool, dtype: torch.dtype) -> None:
    weight = parameter(dtype)
    start = torch.full((19, 6), 0.25)
    weight.main_grad = start.clone()
    torch._dynamo.reset()
    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    buffer, scales = weight.main_grad, [1.0, 0.5, -2.0]
    for seed, scale in enumerate(scales):
        hidden, target = make(seed)
        hidden = hidden.to(dtype).requires_grad_()
        (scale * call(hidden, weight, target, into_main_grad=True)).backward()
        plain = hidden.detach().requires_grad_()
        (scale * loss(plain, weight.detach(), target)).backward()
        torch.testing.assert_close(hidden.grad, plain.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    assert weight.grad is None
    assert weight.main_grad is buffer
    # bf16's rounding would be 4e-3
    assert relative_error(buffer - start, sum_of_gradients(loss, weight, scales)) <= 1e-6


@every_loss
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_alive(loss: Loss, order: tuple[int, int]) -> None:
    weight = parameter()
    weight.main_grad = torch.zeros(19, 6)
    losses = [loss(*((h, weight, t)), into_main_grad=True) for h, t in map(make, range(2))]
    assert not weight.main_grad.any()  # a forward adds nothing
    for i in order:
        losses[i].backward()
    assert weight.grad is None
    assert relative_error(weight.main_grad, sum_of_gradients(loss, weight, [1.0, 1.0])) <= 1e-6


@every_loss
def test_every_backward_adds(loss: Loss) -> None:
    weight = parameter()
    weight.main_grad = torch.zeros(19, 6)
    hidden, target = make()
    value = loss(hidden, weight, target, into_main_grad=True)
    value.backward(retain_graph=True)
    value.backward()
    assert relative_error(weight.main_grad, sum_of_gradients(loss, weight, [2.0])) <= 1e-6


@every_loss
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_once(loss: Loss, use_reentrant: bool) -> None:
    weight = parameter()
    weight.main_grad = torch.zeros(19, 6)
    hidden, target = make()

    def call(h: Tensor) -> Tensor:
        return loss(h, weight, target, into_main_grad=True)

    checkpoint(call, hidden.requires_grad_(), use_reentrant=use_reentrant).backward()
    assert weight.grad is None
    assert relative_error(weight.main_grad, sum_of_gradients(loss, weight, [1.0])) <= 1e-6


@every_loss
def test_a_view_of_a_larger_buffer(loss: Loss) -> None:
    """Where a trainer keeps all parameters' gradients side by side."""
    weight, flat = parameter(), torch.zeros(200)
    weight.main_grad = flat[50 : 50 + 19 * 6].view(19, 6)
    hidden, target = make()
    loss(hidden, weight, target, into_main_grad=True).backward()
    assert relative_error(weight.main_grad, sum_of_gradients(loss, weight, [1.0])) <= 1e-6
    assert not flat[:50].any()
    assert not flat[50 + 19 * 6 :].any()


@every_loss
def test_nothing_for_a_frozen_weight_or_without_gradients(loss: Loss) -> None:
    weight = parameter()
    weight.main_grad = torch.zeros(19, 6)
    hidden, target = make()
    with torch.no_grad():
        loss(hidden, weight, target, into_main_grad=True)
    weight.requires_grad_(False)
    loss(hidden.requires_grad_(), weight, target, into_main_grad=True).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert not weight.main_grad.any()


@every_loss
def test_bad_buffers(loss: Loss) -> None:
    hidden, target = make()
    for buffer, error, message in (
        (None, ValueError, r"into_main_grad: expected `weight.main_grad` to be a tensor, the weight has none"),
        (torch.zeros(19, 6).bfloat16(), TypeError, "weight.main_grad: expected dtype float32, got bfloat16"),
        (torch.zeros(19, 6).double(), TypeError, "weight.main_grad: expected dtype float32, got float64"),
        (torch.zeros(6, 19), ValueError, r"weight.main_grad: expected shape \[V, D\] = \[19, 6\], got \[6, 19\]"),
        (torch.zeros(19, 6, device="meta"), ValueError, "weight.main_grad: expected a tensor on cpu, got one on meta"),
        ([[0.0]], TypeError, r"weight.main_grad: expected a tensor of shape \[V, D\] and dtype float32, got list"),
    ):
        weight = parameter()
        weight.main_grad = buffer
        with pytest.raises(error, match=message):
            loss(hidden, weight, target, into_main_grad=True)
    with pytest.raises(ValueError, match="the weight has none"):
        loss(hidden, parameter(), target, into_main_grad=True)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_loss
@pytest.mark.usefixtures("process_group")
def test_a_distributed_tensor_is_refused(loss: Loss) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, target = make()
    weight = distribute_tensor(parameter().detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
    hint = re.escape('gather it first, as with `full_tensor(grad_placements=[Partial("avg")])`')
    with pytest.raises(TypeError, match=f"weight: expected a plain tensor, got a DTensor; {hint}"):
        loss(hidden, weight, target)
    with pytest.raises(TypeError, match=r"lora\.b: expected a plain tensor, got a DTensor; gather it first"):
        loss(hidden, parameter(), target, lora=LoRADelta(torch.ones(6, 6), weight))
    assert torch.isfinite(loss(hidden, weight.full_tensor(), target))


@every_loss
@pytest.mark.parametrize(
    ("mark", "value", "message"),
    [
        ("ds_id", 0, "sharded by DeepSpeed ZeRO-3; gather it first"),
        ("_is_flat_param", True, "sharded by FSDP; gather it first"),
        ("_is_sharded", True, "sharded by FSDP; gather it first"),
    ],
)
def test_sharded_parameters_are_refused(loss: Loss, mark: str, value: Any, message: str) -> None:
    hidden, target = make()
    weight = parameter()
    setattr(weight, mark, value)
    with pytest.raises(TypeError, match=f"weight: expected a plain tensor, got .*{message}"):
        loss(hidden, weight, target)


@every_loss
def test_a_flattened_shard_is_refused_and_a_whole_view_is_not(loss: Loss) -> None:
    """FSDP1 with `use_orig_params`: outside its forward a parameter is a row of what this rank holds."""
    hidden, target = make()
    for weight in (parameter().flatten()[:0], parameter().flatten()[:5], parameter()):
        weight._fsdp_flattened = True  # type: ignore[attr-defined]
        if weight.ndim == 2:
            assert torch.isfinite(loss(hidden, weight, target))
            continue
        with pytest.raises(TypeError, match="weight: expected a plain tensor, got one sharded by FSDP"):
            loss(hidden, weight, target)
