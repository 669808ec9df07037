"""That the dry run of gpu_dry_run.py sees what is wrong: uses that are faulty on purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from .gpu_dry_run import Reads, dry_run
from .test_gpu_dry_run import BF16, FP16, Head, fake_gpu, floats

__all__ = ["fake_gpu"]  # the fixture


def faults_of(call: Callable[[], Any]) -> str:
    with dry_run() as run:
        call()
    return "\n".join(run.faults)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("item", lambda x: x.sum().item()),
        ("tolist", lambda x: x.tolist()),
        ("nonzero", lambda x: x.nonzero()),
        ("boolean key", lambda x: x[x > 0]),
        ("branch", lambda x: 1 if (x > 0).any() else 0),
        ("float", lambda x: float(x.amax())),
        ("cpu", lambda x: x.cpu()),
        ("to", lambda x: x.to("cpu", non_blocking=False)),
    ],
)
def test_a_host_sync_is_a_fault(name: str, wait: Callable[[Tensor], Any]) -> None:
    assert "host sync" in faults_of(lambda: wait(floats(8)))


@pytest.mark.usefixtures("fake_gpu")
def test_reads_are_faults_where_they_are_not_announced_or_are_captured() -> None:
    head = Head()
    assert "host sync: nonzero" in faults_of(partial(head.loss, mask=True))
    with dry_run(Reads(("nonzero",), rows=5)) as run:
        head.loss()
    assert run.faults == ["host syncs: [], not ['nonzero']"]
    with dry_run(Reads(("nonzero",), rows=5), capturing=True) as run:
        floats(5).nonzero()
    assert run.faults == ["host sync: nonzero"]


@pytest.mark.usefixtures("fake_gpu")
def test_operands_of_kernels_that_are_wrong_are_faults() -> None:
    from fastgrpo_kernels.head.settle.kernel import row_factor, scale_rows

    def scaled(x: Tensor, factor: Tensor | None = None) -> str:
        return faults_of(lambda: scale_rows(x, floats(8) if factor is None else factor, floats(*x.shape)))

    with dry_run():
        matrix, misaligned, narrow = floats(8, 64), floats(9, 65)[1:, 1:], floats(8, 65)
        apart, on_cpu = floats(16)[::2], torch.empty(8)
        half, double = floats(8, dtype=BF16), floats(8, dtype=torch.float64)
    assert scaled(matrix) == ""
    assert "p_x: does not divide by 16" in scaled(misaligned)
    assert "x_stride: does not divide by 16" in scaled(narrow)
    assert "p_factor: a vector with stride 2" in scaled(matrix, apart)
    assert "p_factor: on cpu" in scaled(matrix, on_cpu)
    assert "p_factor: *fp64" in scaled(matrix, double)
    assert "p_grad_logprob: *bf16" in faults_of(lambda: row_factor(half, floats(8), 1.0))


@pytest.mark.usefixtures("fake_gpu")
def test_descriptors_that_tma_does_not_take_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrpo_kernels.head.exp_gemm import kernel

    monkeypatch.setattr(kernel, "check", lambda *_: None)

    def faults(hidden: Callable[[], Tensor]) -> str:
        def call() -> None:
            sums, moments = floats(2, 8, 300)
            weight, shift = floats(1024, 256, dtype=BF16), floats(300)
            kernel.exp_gemm(hidden(), weight, shift, sums, moments, mode="statistics", input_scale=1.0)

        return faults_of(call)

    assert faults(lambda: floats(300, 256, dtype=BF16)) == ""
    assert "hidden: descriptor of a base" in faults(lambda: floats(300, 264, dtype=BF16)[:, 1:257])
    with pytest.raises(AssertionError, match="strides must be 16-byte aligned"):
        faults(lambda: floats(300, 257, dtype=BF16)[:, :256])


@pytest.mark.usefixtures("fake_gpu")
def test_a_launch_that_is_not_listed_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrpo_kernels.grpo_loss import kernel as losses
    from fastgrpo_kernels.head.settle import kernel as settle

    monkeypatch.setitem(settle.SCALE_TILING, "num_warps", 16)
    monkeypatch.setattr(losses, "BLOCK", 64)
    faults = faults_of(Head().loss)
    assert "scale_rows_kernel: not listed: 16 warps" in faults
    assert "coefficients_kernel: not listed: BLOCK: 64" in faults
    assert "settle_kernel" not in faults


@pytest.mark.usefixtures("fake_gpu")
def test_gemms_that_cublas_would_not_take_are_faults() -> None:
    from fastgrpo_kernels.head.device_gemm import add_mm, mm

    def faults(a: Tensor, b: Tensor, out: Tensor) -> str:
        return faults_of(lambda: mm(a, b, out=out))

    with dry_run():
        a, b, out = floats(16, 32, dtype=BF16), floats(32, 8, dtype=BF16), floats(16, 8)
        apart = floats(16, 64, dtype=BF16)[:, ::2]
        transposed, other, wrong = b.t().contiguous().t(), floats(32, 8, dtype=FP16), floats(8, 16)
    assert faults(a, b, out) == ""
    assert faults(a, transposed, out) == ""
    assert "a [16, 32] is copied, its strides are [64, 2]" in faults(apart, b, out)
    assert "torch.bfloat16 x torch.float16" in faults(a, other, out)
    assert "-> torch.bfloat16" in faults_of(lambda: add_mm(floats(16, 8, dtype=BF16), a, b))
    assert "-> [8, 16]" in faults(a, b, wrong)


@pytest.mark.usefixtures("fake_gpu")
def test_ops_unlike_their_fake_implementations_are_faults() -> None:
    @torch.library.custom_op("fastgrpo_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    @double.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.float64)

    double.register_autograd(lambda _, grad: grad.new_empty(3), setup_context=lambda ctx, inputs, output: None)
    faults = faults_of(lambda: double(floats(8, grad=True)))
    assert "fastgrpo_test::double: result 0 is" in faults
    assert "fastgrpo_test::double: gradient 0 is" in faults
