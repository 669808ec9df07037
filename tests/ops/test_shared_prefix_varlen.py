"""`shared_prefix_attention` on a GPU: the calls, with dense maths in the kernels' place, and on a GPU the real ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import PackedLayout
from fastgrpo_kernels.shared_prefix_attention import backends, torch_flash, varlen
from fastgrpo_kernels.shared_prefix_attention.op import shared_prefix_attention
from fastgrpo_kernels.shared_prefix_attention.options import Options, merge_
from fastgrpo_kernels.shared_prefix_attention.reference import shared_prefix_attention_reference as reference

from .attention_cases import GROUPS, NAMES, DenseVarlen, assert_near, inputs, rms, run
from .flash_stand_ins import STAND_INS, clear, install

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


@pytest.fixture(params=["aten", *STAND_INS])
def maths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[DenseVarlen]:
    """All four, each in its turn, whatever would be chosen."""
    if request.param == "aten":
        yield request.getfixturevalue("aten")
        return
    maths = DenseVarlen()
    install(monkeypatch, request.param, maths)
    monkeypatch.setattr(backends, "choose", lambda *_: request.param)
    yield maths
    clear()


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


@pytest.mark.parametrize("window", [1, 3, 8])
def test_windows_of_plain_packing(maths: DenseVarlen, window: int) -> None:
    layout = PackedLayout([5, 9, 2], [[], [], []])
    x = inputs(layout)
    assert_near(run(shared_prefix_attention, x, layout, window=window), run(reference, x, layout, window=window))


def test_a_window_as_long_as_the_longest_path_is_none(maths: DenseVarlen) -> None:
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    x = inputs(layout)
    assert_near(run(shared_prefix_attention, x, layout, window=9), run(reference, x, layout, window=9))


@pytest.mark.parametrize("maths", ["flash_attn_2", "flash_attn_3"], indirect=True)
def test_softcaps(maths: DenseVarlen) -> None:
    plain, shared = PackedLayout([5, 9, 2], [[], [], []]), PackedLayout([3, 5], [[2, 4, 4], [1]])
    for layout, options in ((plain, {"window": 3, "softcap": 1.5}), (shared, {"softcap": 1.5, "window": 9})):
        x = inputs(layout)
        assert_near(run(shared_prefix_attention, x, layout, **options), run(reference, x, layout, **options))


@pytest.mark.parametrize("none", [torch.inf, -torch.inf])
def test_a_merge_with_no_keys_at_all(none: float) -> None:
    """The packages disagree about the log-sum-exp of nothing; what comes with it is 0 in all of them."""
    out, lse = torch.randn(3, 2, 8), torch.randn(2, 3)
    want = out.clone(), lse.clone()
    merge_(out, lse, torch.zeros(3, 2, 8), torch.full((2, 3), none))
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


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


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_always_the_repeatable_backward(maths: DenseVarlen, mode: str) -> None:
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    x = inputs(layout)
    torch.set_deterministic_debug_mode(mode)
    before = torch.get_deterministic_debug_mode()
    try:
        run(shared_prefix_attention, x, layout)
        assert torch.get_deterministic_debug_mode() == before
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.set_deterministic_debug_mode("default")
    assert [c["strict"] for c in maths.calls if c["pass_"] == "backward"] == [True, True]


def test_a_backward_that_fails_leaves_the_flags_as_they_were(aten: DenseVarlen, monkeypatch: Any) -> None:
    layout = PackedLayout([3], [[2, 4]])
    x = inputs(layout)
    out = shared_prefix_attention(*x[:3], layout)

    def fail(*_: Any) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(aten, "backward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        out.backward(x[3])
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_backwards_in_threads_do_not_mix_up_the_flags() -> None:
    """As those of several GPUs in one process: nobody switches off what another one still needs."""
    entered = threading.Event()

    def another() -> None:
        with torch_flash._repeatable():
            entered.set()

    thread = threading.Thread(target=another)
    with torch_flash._repeatable():
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()
    assert not torch.are_deterministic_algorithms_enabled()


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision goes to these kernels, or the test is skipped with the reason."""
    kernels = backends._KERNELS[name]
    reason = kernels.unavailable(torch.device("cuda"))
    if reason:
        pytest.skip(f"{name}: {reason}")
    choose = backends.choose
    half = (torch.float16, torch.bfloat16)
    monkeypatch.setattr(backends, "choose", lambda q, *rest: name if q.dtype in half else choose(q, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("name", backends._KERNELS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("groups", [([70, 300], [[30, 45, 200], [60]]), *GROUPS], ids=str)
def test_on_a_gpu(
    name: str, heads: tuple[int, int], d: int, groups: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(name, monkeypatch)
    layout = PackedLayout(*groups, device="cuda")
    x = inputs(layout, *heads, d=d, dtype=torch.bfloat16)
    exact = [*(t.detach().double().requires_grad_() for t in x[:3]), x[3].double()]
    want = run(reference, exact, layout)
    assert_near(run(shared_prefix_attention, exact, layout), want)
    got, plain = run(shared_prefix_attention, x, layout), run(reference, x, layout)
    for what, a, b, c in zip(NAMES, got, plain, want, strict=True):
        assert a.isfinite().all(), what
        if a.numel():
            assert rms(a.double() - c) <= 1.5 * rms(b.double() - c) + 1e-6, what


@pytest.mark.gpu
@pytest.mark.parametrize("name", backends._KERNELS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_on_a_gpu_without_waiting_and_bitwise_repeatable(
    name: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(name, monkeypatch)
    layout = PackedLayout([700, 300, 5], [[300, 450, 200], [], [600]], device="cuda")
    x = inputs(layout, *heads, dtype=torch.bfloat16, d=64)
    first = run(shared_prefix_attention, x, layout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [run(shared_prefix_attention, x, layout) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in others:
        for what, a, b in zip(NAMES, first, other, strict=True):
            assert torch.equal(a, b), what
