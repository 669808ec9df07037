"""`shared_prefix_attention` on a GPU, every kernel that is here: layouts, windows, softcap, autocast, graphs, compile.

More in test_shared_prefix_varlen.py: exactness on small layouts, no waiting.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import PackedLayout
from fastgrpo_kernels.shared_prefix_attention import backends
from fastgrpo_kernels.shared_prefix_attention.op import shared_prefix_attention, why_not_flash
from fastgrpo_kernels.shared_prefix_attention.options import Options, Part
from fastgrpo_kernels.shared_prefix_attention.reference import shared_prefix_attention_reference as reference

from .attention_cases import NAMES, inputs, rms, run
from .test_gpu_ops import assert_equal, assert_repeats, replayed
from .test_shared_prefix_varlen import only

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LAYOUTS: dict[str, tuple[list[int], list[list[int]]]] = {
    "groups": ([130, 40, 257], [[90, 1, 64, 200], [33, 65], [128, 128]]),
    "empty groups": ([70, 33, 129, 5], [[], [30, 0, 45], [], []]),
    "unasked before and between": ([64, 200, 31, 90], [[], [70, 5], [0], [40, 41]]),
    "one prompt, one completion": ([129], [[257]]),
    "one token": ([1], [[]]),
    "one token each": ([1, 1], [[1, 1], [1]]),
    "long": ([1024], [[512, 300, 512, 7]]),
}
PLAIN: tuple[list[int], list[list[int]]] = ([200, 33, 1, 70], [[], [], [], []])
Groups = tuple[list[int], list[list[int]]]


def case(groups: Groups, heads: tuple[int, int] = (8, 2), d: int = 64, dtype: torch.dtype = torch.bfloat16) -> Any:
    """layout, and what `run` takes."""
    layout = PackedLayout(*groups, device=DEVICE)
    return layout, inputs(layout, *heads, d=d, dtype=dtype)


def skip_unless(name: str, q: Tensor, window: int | None = None, softcap: float | None = None) -> None:
    reason = backends._KERNELS[name].unsupported(q, Options(1.0, window, softcap))
    if reason:
        pytest.skip(f"{name}: {reason}")


def assert_no_coarser_than_plain(x: list[Tensor], layout: PackedLayout, **options: Any) -> None:
    exact = [*(t.detach().double().requires_grad_() for t in x[:3]), x[3].double()]
    got, plain, want = (
        run(attend, operands, layout, **options)
        for attend, operands in ((shared_prefix_attention, x), (reference, x), (reference, exact))
    )
    for what, a, b, c in zip(NAMES, got, plain, want, strict=True):
        assert a.isfinite().all(), what
        assert rms(a.double() - c) <= 1.5 * rms(b.double() - c) + 1e-6, what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "d"), [((8, 2), 64), ((4, 4), 128), ((6, 1), 128), ((4, 2), 256)], ids=str)
@pytest.mark.parametrize("groups", LAYOUTS)
@pytest.mark.parametrize("name", backends._KERNELS)
def test_layouts(
    name: str, groups: str, heads: tuple[int, int], d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(name, monkeypatch)
    layout, x = case(LAYOUTS[groups], heads, d, dtype)
    skip_unless(name, x[0])
    assert_no_coarser_than_plain(x, layout)


@pytest.mark.parametrize("window", [1, 17, 64, 199])
@pytest.mark.parametrize("name", backends._KERNELS)
def test_windows_where_nothing_is_shared(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    only(name, monkeypatch)
    layout, x = case(PLAIN)
    skip_unless(name, x[0], window)
    assert_no_coarser_than_plain(x, layout, window=window)


@pytest.mark.parametrize("groups", ["groups", "plain"])
@pytest.mark.parametrize("name", backends._KERNELS)
def test_softcap(name: str, groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(name, monkeypatch)
    layout, x = case(LAYOUTS.get(groups, PLAIN))
    skip_unless(name, x[0], softcap=5.0)
    assert_no_coarser_than_plain(x, layout, softcap=5.0)


def test_a_window_over_shared_prompts_is_refused() -> None:
    layout, x = case(LAYOUTS["groups"])
    reason = why_not_flash(x[0], layout, window=8)
    assert reason is not None
    with pytest.raises(ValueError, match="window") as error:
        shared_prefix_attention(*x[:3], layout, window=8)
    assert str(error.value) == reason


def test_the_first_usable_is_chosen() -> None:
    described = backends.describe(DEVICE)
    layout, x = case(LAYOUTS["groups"])
    assert backends.choose(x[0], layout.attention, Options(1.0, None, None)) in [
        n for n, why in described if why == "used"
    ]
    assert [name for name, _ in described] == [*backends._KERNELS, "dense"]


@pytest.mark.parametrize("name", backends._KERNELS)
def test_queries_without_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes of them, and their log-sum-exp, +inf or -inf, is one that the merge knows."""
    only(name, monkeypatch)
    _, x = case(([12], [[]]))
    cu_q, cu_k = (torch.tensor(bounds, dtype=torch.int32, device=DEVICE) for bounds in ([0, 4, 12], [0, 0, 12]))
    out, lse = backends._KERNELS[name].forward(*x[:3], Part(cu_q, cu_k, 8, 12, False), Options(0.125, None, None))
    assert (out[:4] == 0).all()
    assert lse.shape == (8, 12)
    assert lse[:, :4].isinf().all()
    assert lse[:, 4:].isfinite().all()


@pytest.mark.parametrize("name", backends._KERNELS)
def test_repeats_bitwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(name, monkeypatch)
    layout, x = case(([700, 300, 5], [[300, 450, 200], [], [600]]), (14, 2))
    assert_repeats(lambda: run(shared_prefix_attention, x, layout), times=20)


@pytest.mark.parametrize("name", backends._KERNELS)
def test_captured_in_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(name, monkeypatch)
    layout, x = case(LAYOUTS["groups"])
    graph, outputs = replayed(lambda: run(shared_prefix_attention, x, layout))
    for _ in range(2):
        with torch.no_grad():
            for t in x:
                t.copy_(t.flip(0) * 0.9)
        graph.replay()
        assert_equal(outputs, run(shared_prefix_attention, x, layout))


@pytest.mark.parametrize("name", backends._KERNELS)
def test_on_another_stream_and_of_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads before rows in memory, as transformers has them."""
    only(name, monkeypatch)
    layout, x = case(LAYOUTS["groups"])
    want = run(shared_prefix_attention, x, layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        views = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in x[:3]]
        got = run(shared_prefix_attention, [*views, x[3]], layout)
    side.synchronize()
    assert_equal(got, want)


def test_autocast() -> None:
    layout, x = case(LAYOUTS["groups"], dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = shared_prefix_attention(*x[:3], layout)
    assert out.dtype == torch.bfloat16
    half = [t.detach().bfloat16().requires_grad_() for t in x[:3]]
    want = run(shared_prefix_attention, [*half, x[3].bfloat16()], layout)
    grads = torch.autograd.grad(out, x[:3], x[3].bfloat16())
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert_equal([out.detach(), *(g.bfloat16() for g in grads)], want)


def test_compiled_whole_for_any_lengths() -> None:
    """One graph, and lengths that change; the kernels are the same, and so are the bits."""

    @torch.compile(fullgraph=True, dynamic=True)
    def call(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        return shared_prefix_attention(q * 1.0, k, v, layout)

    for groups in (LAYOUTS["groups"], LAYOUTS["long"]):
        layout, x = case(groups)
        assert_equal(run(call, x, layout), run(shared_prefix_attention, x, layout))
