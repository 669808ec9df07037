"""`shared_prefix_attention` on a GPU: the calls, with dense maths in the kernels' place, and on a GPU the real ones."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import PackedLayout
from fastgrpo_kernels.shared_prefix_attention import backends, flash_attn_package, torch_flash, varlen
from fastgrpo_kernels.shared_prefix_attention.op import shared_prefix_attention
from fastgrpo_kernels.shared_prefix_attention.options import Options
from fastgrpo_kernels.shared_prefix_attention.reference import shared_prefix_attention_reference as reference

from .attention_cases import GROUPS, NAMES, DenseVarlen, assert_near, inputs, rms, run

HEADS = [(4, 4), (4, 2), (4, 1)]


@pytest.fixture
def aten(monkeypatch: pytest.MonkeyPatch) -> Iterator[DenseVarlen]:
    """PyTorch's flash ops, which the CPU has not, made of dense maths: their own schema checks the calls."""
    maths = DenseVarlen()

    def limits(options: dict[str, Any], causal: bool) -> int:
        left, right = options.get("window_size_left"), options.get("window_size_right")
        assert left is None or (right == 0 and causal)
        return -1 if left is None else left

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **options: Any) -> tuple[Tensor, ...]:
        *bounds, dropout, causal, debug = rest
        assert (dropout, debug) == (0.0, False)
        out, lse = maths.forward(q, k, v, tuple(bounds), causal, scale, limits(options, causal), 0.0)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)

    def backward(*x: Any, scale: float, **options: Any) -> tuple[Tensor, ...]:
        *bounds, dropout, causal, state, unused = x[6:]
        assert (dropout, state.dtype, unused.numel()) == (0.0, torch.uint64, 0)
        return maths.backward(x[:6], tuple(bounds), causal, scale, limits(options, causal), 0.0)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        monkeypatch.setattr(backends, "choose", lambda *_: "torch")
        yield maths


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> DenseVarlen:
    """A flash_attn 2.8 of dense maths, with its signatures."""
    maths = DenseVarlen()

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        assert (window_size_left, window_size_right) == (-1, -1) or (causal and window_size_right == 0)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = maths.forward(q, k, v, bounds, causal, softmax_scale, window_size_left, softcap)
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes) == (0.0, None)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        x = (dout, q, k, v, out, softmax_lse)
        for to, grad in zip(
            (dq, dk, dv), maths.backward(x, bounds, causal, softmax_scale, window_size_left, softcap), strict=True
        ):
            to.copy_(grad)
        maths.calls[-1]["strict"] = deterministic

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.__dict__.update(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
    parent = types.ModuleType("flash_attn")
    parent.__dict__["flash_attn_interface"] = interface
    monkeypatch.setitem(sys.modules, "flash_attn", parent)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(backends, "choose", lambda *_: "flash_attn")
    return maths


@pytest.fixture(params=["aten", "package"])
def maths(request: pytest.FixtureRequest) -> DenseVarlen:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_exact(maths: DenseVarlen, groups: tuple[Any, Any], heads: tuple[int, int]) -> None:
    layout = PackedLayout(*groups)
    x = inputs(layout, *heads)
    assert_near(run(shared_prefix_attention, x, layout, scale=0.7), run(reference, x, layout, scale=0.7))
    calls = 0 if not layout.num_tokens else 2 if layout.attention.num_queries else 1
    assert [c["pass_"] for c in maths.calls] == ["forward"] * calls + ["backward"] * calls
    assert [c["causal"] for c in maths.calls] == [True, False][:calls] * 2


def test_plain_packing_is_one_call_each_way(maths: DenseVarlen) -> None:
    """So is a prompt that its one completion follows: what plain varlen costs."""
    for layout in (PackedLayout([5, 9, 2], [[], [], []]), PackedLayout([4], [[3]]), PackedLayout([4, 2], [[], [0, 3]])):
        maths.calls.clear()
        run(shared_prefix_attention, inputs(layout), layout)
        assert len(maths.calls) == 2


def test_windows_and_softcap_of_plain_packing(package: DenseVarlen) -> None:
    layout = PackedLayout([5, 9, 2], [[], [], []])
    x = inputs(layout)
    options = {"window": 3, "softcap": 1.5}
    assert_near(run(shared_prefix_attention, x, layout, **options), run(reference, x, layout, **options))
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    x = inputs(layout)
    options = {"softcap": 1.5, "window": 9}  # as long as the longest path: no window
    assert_near(run(shared_prefix_attention, x, layout, **options), run(reference, x, layout, **options))


def test_windows_of_plain_packing_in_torch(aten: DenseVarlen) -> None:
    layout = PackedLayout([5, 9, 2], [[], [], []])
    x = inputs(layout)
    assert_near(run(shared_prefix_attention, x, layout, window=3), run(reference, x, layout, window=3))


def test_a_merge_of_rounded_parts(maths: DenseVarlen) -> None:
    """Partial outputs are rounded to bf16, and so is their merge, in fp32: sqrt(2) of plain rounding, no more."""
    layout = PackedLayout([30, 20], [[10, 25, 10], [30, 10]])
    x = inputs(layout, d=32, dtype=torch.bfloat16)
    exact = [*(t.detach().double().requires_grad_() for t in x[:3]), x[3].double()]
    want = run(reference, exact, layout)
    got = run(shared_prefix_attention, x, layout)
    assert [t.dtype for t in got] == [torch.bfloat16] * 4
    plain = run(reference, x, layout)
    for name, a, b, c in zip(NAMES, got, plain, want, strict=True):
        assert rms(a.double() - c) <= 1.5 * rms(b.double() - c), name


@pytest.mark.parametrize("window", [None, 3])
def test_pytorch_s_own_ops_take_the_calls(window: int | None) -> None:
    """On meta tensors: the real ops' schemas, shapes and dtypes, which are those that our fake op promises."""
    layout = PackedLayout([70, 30, 5], [[30, 45], [], [60]], device="meta")
    x = inputs(layout, dtype=torch.bfloat16, d=64)
    got = run(shared_prefix_attention, x, layout, window=window)
    flash, options, x = torch_flash.TorchFlash(), Options(0.1, window, None), [t.detach() for t in x]
    real = varlen.forward(flash, x[0], x[1], x[2], layout.attention, options)
    assert [(t.shape, t.dtype) for t in real] == [(x[0].shape, torch.bfloat16), ((4, layout.num_tokens), torch.float32)]
    grads = varlen.backward(flash, x[3], x[0], x[1], x[2], *real, layout.attention, options)
    for a, b in zip([real[0], *grads], got, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_where_it_is_asked_for(maths: DenseVarlen, warn_only: bool) -> None:
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    x = inputs(layout)
    run(shared_prefix_attention, x, layout)
    assert not any(c["strict"] for c in maths.calls if c["pass_"] == "backward")
    maths.calls.clear()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        run(shared_prefix_attention, x, layout)
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(c["strict"] for c in maths.calls if c["pass_"] == "backward")


class Somewhere:
    """As much of a tensor as a choice looks at."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16, d: int = 64) -> None:
        self.device, self.dtype, self.shape = torch.device(device), dtype, (1, 1, d)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = PackedLayout([3, 5], [[2, 4, 4], [1]]).attention
    plain = PackedLayout([3, 5], [[], []]).attention
    monkeypatch.setattr(backends, "_has_flash", lambda _: True)
    monkeypatch.setattr(flash_attn_package, "installed", lambda: False)

    def choose(
        ranges: Any, device: str = "cuda", window: int | None = None, softcap: float | None = None, **q: Any
    ) -> str:
        return backends.choose(Somewhere(device, **q), ranges, Options(1.0, window, softcap))  # type: ignore[arg-type]

    assert choose(shared) == "torch"
    assert choose(plain, window=3) == "torch"
    assert choose(shared, dtype=torch.float32) == choose(shared, dtype=torch.float64, softcap=1.0) == "dense"
    assert choose(shared, d=20) == choose(shared, d=264) == choose(shared, "mps") == "dense"
    assert choose(shared, "cpu", window=3) == "cpu"
    assert choose(shared, "cpu", softcap=3.0) == "dense"
    with pytest.raises(ValueError, match=r"window: .* window of 3 .*PackedLayout with the lengths"):
        choose(shared, window=3)
    with pytest.raises(ValueError, match=r"softcap: PyTorch's flash attention has none, got 2.0"):
        choose(shared, softcap=2.0)
    monkeypatch.setattr(flash_attn_package, "installed", lambda: True)
    assert choose(shared) == choose(shared, softcap=2.0) == choose(plain, window=3) == "flash_attn"
    with pytest.raises(ValueError, match="window:"):
        choose(shared, window=3)
    monkeypatch.setattr(backends, "_has_flash", lambda _: False)
    assert choose(shared) == "dense"


@pytest.mark.parametrize(
    ("version", "usable"), [("2.8.3", True), ("2.7.0.post2", True), ("2.6.3", False), ("3.0.0", False), ("x", False)]
)
def test_versions_of_the_package(
    version: str, usable: bool, package: DenseVarlen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn_package.importlib.metadata, "version", lambda _: version)
    assert flash_attn_package.installed.__wrapped__() == usable


def test_no_package() -> None:
    assert not flash_attn_package.installed()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("groups", [([70, 300], [[30, 45, 200], [60]]), *GROUPS], ids=str)
def test_on_a_gpu(heads: tuple[int, int], d: int, groups: tuple[Any, Any]) -> None:
    layout = PackedLayout(*groups, device="cuda")
    x = inputs(layout, *heads, d=d, dtype=torch.bfloat16)
    exact = [*(t.detach().double().requires_grad_() for t in x[:3]), x[3].double()]
    want = run(reference, exact, layout)
    assert_near(run(shared_prefix_attention, exact, layout), want)
    got, plain = run(shared_prefix_attention, x, layout), run(reference, x, layout)
    for name, a, b, c in zip(NAMES, got, plain, want, strict=True):
        assert a.isfinite().all(), name
        if a.numel():
            assert rms(a.double() - c) <= 1.5 * rms(b.double() - c) + 1e-6, name


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_and_bitwise_repeatable() -> None:
    layout = PackedLayout([70, 300, 5], [[30, 45, 200], [], [60]], device="cuda")
    x = inputs(layout, dtype=torch.bfloat16, d=64)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(shared_prefix_attention, x, layout)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        second = run(shared_prefix_attention, x, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name
