"""`shared_prefix_attention` on the CPU: against every score at once in float64, and as an op of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels import PackedLayout
from fastgrpo_kernels.shared_prefix_attention import cpu, dense
from fastgrpo_kernels.shared_prefix_attention.op import shared_prefix_attention
from fastgrpo_kernels.shared_prefix_attention.options import Options, merge_
from fastgrpo_kernels.shared_prefix_attention.reference import shared_prefix_attention_reference as reference
from fastgrpo_kernels.shared_prefix_attention.reference import visible

from .attention_cases import GROUPS, NAMES, assert_near, inputs, ragged, rms, run

HEADS = [(4, 4), (4, 2), (4, 1), (1, 1)]
OPTIONS: list[dict[str, Any]] = [{}, {"window": 3}, {"window": 1}, {"softcap": 1.5}, {"window": 4, "softcap": 2.0}]


def test_what_is_visible_by_hand() -> None:
    layout = PackedLayout([2, 1], [[1, 2], [1]])
    want = """
        10000000
        11000000
        00100000
        11010000
        11001000
        11001100
        00100010"""
    rows = [[c == "1" for c in line.strip()] for line in want.split()]
    assert visible(layout).tolist() == [row[: layout.num_tokens] for row in rows]
    assert visible(layout, 2)[5].nonzero().flatten().tolist() == [4, 5]
    assert visible(layout, 3)[5].nonzero().flatten().tolist() == [1, 4, 5]


def test_the_reference_is_the_attention_of_each_sequence_alone() -> None:
    layout = PackedLayout([3, 2], [[2, 4], [3]])
    q, k, v, _ = inputs(layout, 2, 2)
    out = reference(q, k, v, layout)
    for prompt, completion in [((0, 3), (5, 7)), ((0, 3), (7, 11)), ((3, 5), (11, 14))]:
        rows = torch.cat([torch.arange(*prompt), torch.arange(*completion)])
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1) for x in (q, k, v)), is_causal=True
        )
        torch.testing.assert_close(out[rows], alone.transpose(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exact(groups: tuple[Any, Any], heads: tuple[int, int], options: dict[str, Any]) -> None:
    layout = PackedLayout(*groups)
    x = inputs(layout, *heads)
    assert_near(run(shared_prefix_attention, x, layout, **options), run(reference, x, layout, **options))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    groups=ragged(),
    heads=st.sampled_from([*HEADS, (6, 3)]),
    d=st.sampled_from([8, 16, 24]),
    scale=st.sampled_from([None, 0.7, 3.0]),
    window=st.sampled_from([None, 1, 2, 5, 1000]),
    softcap=st.sampled_from([None, None, 2.0]),
)
def test_exact_on_ragged_layouts(groups: tuple[Any, Any], heads: tuple[int, int], d: int, **options: Any) -> None:
    layout = PackedLayout(*groups)
    x = inputs(layout, *heads, d=d)
    assert_near(run(shared_prefix_attention, x, layout, **options), run(reference, x, layout, **options))


@pytest.mark.parametrize("d", [16, 64, 80, 128, 256])
def test_head_sizes(d: int) -> None:
    layout = PackedLayout([40, 33], [[17, 17, 3], [65]])
    x = inputs(layout, 4, 2, d=d)
    assert_near(run(shared_prefix_attention, x, layout), run(reference, x, layout))


@pytest.mark.parametrize("elements", [1, 300, 1 << 22])
def test_dense_blocks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_ELEMENTS", elements)
    layout = PackedLayout([4, 2, 2], [[2, 2], [], [3, 3]])
    x = inputs(layout)
    options = {"softcap": 1.5, "window": 5}
    assert_near(run(shared_prefix_attention, x, layout, **options), run(reference, x, layout, **options))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_coarser_than_plain_pytorch(heads: tuple[int, int], dtype: torch.dtype, softcap: float | None) -> None:
    layout = PackedLayout([70, 40], [[30, 45, 20, 30], [60, 10]])
    x = inputs(layout, *heads, d=32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in x[:3]]
    want = run(reference, [*exact, x[3].double()], layout, softcap=softcap)
    got = run(shared_prefix_attention, x, layout, softcap=softcap)
    if softcap is None:
        mask = visible(layout)

        def plain(q: Tensor, k: Tensor, v: Tensor, _: PackedLayout) -> Tensor:
            rows = (t.transpose(0, 1)[None] for t in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)
            return out[0].transpose(0, 1)

        compared = run(plain, x, layout)
    else:
        compared = run(reference, x, layout, softcap=softcap)
    for name, a, b, c in zip(NAMES, got, compared, want, strict=True):
        assert rms(a.double() - c) <= 1.5 * rms(b.double() - c), name


def test_gradcheck() -> None:
    layout = PackedLayout([2, 1], [[1, 2], [2]])
    q, k, v, _ = inputs(layout, 2, 1, d=4)
    for options in ({}, {"window": 2}, {"softcap": 1.0}):
        assert torch.autograd.gradcheck(lambda *x, o=options: shared_prefix_attention(*x, layout, **o), (q, k, v))


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 2), ()])
def test_any_subset_of_gradients(subset: tuple[int, ...]) -> None:
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    x = inputs(layout)
    want = run(shared_prefix_attention, x, layout)
    parts = [t.detach().requires_grad_(i in subset) for i, t in enumerate(x[:3])]
    out = shared_prefix_attention(*parts, layout)
    assert out.requires_grad == bool(subset)
    if subset:
        out.backward(x[3])
    for i, t in enumerate(parts):
        assert torch.equal(t.grad, want[1 + i]) if i in subset else t.grad is None


def test_siblings_and_other_prompts_see_nothing_of_a_completion() -> None:
    layout = PackedLayout([20, 7], [[9, 12, 9], [5, 5]])
    q, k, v, _ = inputs(layout, dtype=torch.float32)
    start, stop = 27 + 9, 27 + 9 + 12
    before = shared_prefix_attention(q, k, v, layout)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[start:stop] += 1
    after = shared_prefix_attention(*changed, layout)
    others = torch.ones(layout.num_tokens, dtype=torch.bool)
    others[start:stop] = False
    assert torch.equal(before[others], after[others])
    assert (before[~others] != after[~others]).any(-1).all()


def test_views_of_a_fused_projection_and_an_expanded_gradient() -> None:
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    fused = torch.randn(layout.num_tokens, 8 * 16, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.view(-1, 8, 16).split([4, 2, 2], dim=1)
    (got,) = torch.autograd.grad(shared_prefix_attention(q, k, v, layout).sum(), fused)
    (want,) = torch.autograd.grad(reference(q, k, v, layout).sum(), fused)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    strided = [x.detach().transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    assert {x.stride(-1) for x in strided} != {1}
    assert torch.equal(shared_prefix_attention(*strided, layout), shared_prefix_attention(q, k, v, layout))


class Largest(TorchDispatchMode):
    """The elements of the largest memory that any operation makes or hands on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("lengths", [[4] * 16, [3, 5] * 8], ids=["equal", "ragged"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_no_memory_for_a_prompt_per_completion(lengths: list[int], heads: tuple[int, int]) -> None:
    layout = PackedLayout([64], [lengths])
    q, k, v, dout = (x.detach() for x in inputs(layout, *heads, dtype=torch.float32))
    options = Options(0.25, None, None)
    with Largest() as largest:
        out, lse = cpu.forward(q, k, v, layout.attention, options)
        cpu.backward(dout, q, k, v, out, lse, layout.attention, options)
    assert largest.elements == q.numel()
    assert 16 * 64 * heads[1] * 16 > q.numel()


def test_ranges_by_hand() -> None:
    ranges = PackedLayout([4, 2, 3, 1], [[2, 0, 5], [], [3], [0]]).attention
    assert ranges.cu_self.tolist() == [0, 4, 6, 9, 10, 12, 17, 20]
    assert (ranges.cu_query.tolist(), ranges.cu_key.tolist()) == ([0, 7, 7, 10], [0, 4, 6, 9])
    assert ranges.unasked.tolist() == [4, 5]
    assert (ranges.max_self, ranges.max_query, ranges.max_key) == (5, 7, 4)
    assert (ranges.first_query, ranges.num_queries, ranges.num_keys) == (10, 10, 9)
    followed = PackedLayout([4, 2], [[], [0, 3]])
    assert followed.attention.cu_self.tolist() == [0, 4, 9]
    assert (followed.attention.num_queries, followed.longest) == (0, 5)


def test_merge() -> None:
    g = torch.Generator().manual_seed(0)
    score, values = torch.randn(2, 5, 9, generator=g, dtype=torch.float64), torch.randn(9, 2, 3, generator=g).double()

    def part(columns: slice) -> tuple[Tensor, Tensor]:
        p = score[..., columns]
        return torch.einsum("hij,jhd->ihd", p.softmax(-1), values[columns]), p.logsumexp(-1)

    (out, lse), want = part(slice(0, 4)), part(slice(0, 9))
    merge_(out, lse, *part(slice(4, 9)))
    torch.testing.assert_close((out, lse), want, rtol=1e-13, atol=1e-13)
    for nothing in (torch.inf, -torch.inf):
        merge_(out, lse, torch.zeros_like(out), torch.full_like(lse, nothing))
        torch.testing.assert_close((out, lse), want, rtol=1e-13, atol=1e-13)


def recorded_calls(layout: PackedLayout, **options: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The op and its backward with the arguments that the public function gives them."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastgrpo":
                calls.append((func, tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)))
            return func(*args, **(kwargs or {}))

    with Record():
        run(shared_prefix_attention, inputs(layout), layout, **options)
    return calls


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.5}], ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    for groups in (GROUPS[0], GROUPS[1], GROUPS[-1]):
        calls = recorded_calls(PackedLayout(*groups), **options)
        assert len(calls) == 2
        (op, arguments), (backward, its_arguments) = calls
        torch.library.opcheck(op, (*(x.requires_grad_() for x in arguments[:3]), *arguments[3:]))
        torch.library.opcheck(backward, its_arguments)


def test_compiled_and_not_again_for_other_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(shared_prefix_attention, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    for p in range(4, 10):
        layout = PackedLayout([p, p + 2, 3], [[2, 4 + p, 3], [p] * (p - 2), [4, 5]])
        x = inputs(layout)
        for a, b in zip(run(compiled, x, layout), run(shared_prefix_attention, x, layout), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


def test_gradient_checkpointing() -> None:
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    x = inputs(layout)

    def again(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        return checkpoint(shared_prefix_attention, q, k, v, layout, use_reentrant=False)

    for a, b in zip(run(again, x, layout), run(shared_prefix_attention, x, layout), strict=True):
        assert torch.equal(a, b)


def test_autocast_brings_the_dtypes_together() -> None:
    layout = PackedLayout([3, 5], [[2, 4, 4], [1]])
    q, k, v, _ = inputs(layout, dtype=torch.float32)
    for options in ({}, {"softcap": 1.5}):
        with torch.autocast("cpu", torch.bfloat16):
            out = shared_prefix_attention(q, k, v.bfloat16(), layout, **options)
        want = shared_prefix_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, **options)
        assert torch.equal(out, want)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert shared_prefix_attention(q.double(), k.double(), v.double(), layout).dtype == torch.float64


def test_second_derivatives_are_an_error() -> None:
    layout = PackedLayout([2], [[1, 1]])
    q, k, v, _ = inputs(layout)
    (dq,) = torch.autograd.grad(shared_prefix_attention(q, k, v, layout).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)autograd"):
        dq.sum().backward()


def test_bad_inputs() -> None:
    layout = PackedLayout([2], [[1, 1]])
    q, k, v, _ = inputs(layout)
    for arguments, options, error, message in [
        ((q, k, v, None), {}, TypeError, "layout: expected a PackedLayout, got NoneType"),
        ((q[:3], k, v, layout), {}, ValueError, r"q: expected shape \[T, Hq, d\] = \[4, any, any\], got \[3, 4, 16\]"),
        ((q, k[..., :8], v, layout), {}, ValueError, r"k: expected shape \[T, Hkv, d\] = \[4, any, 16\]"),
        ((q, k, v[:, :1], layout), {}, ValueError, r"v: expected shape \[T, Hkv, d\] = \[4, 2, 16\]"),
        ((q[:, :3], k, v, layout), {}, ValueError, "q: expected a positive multiple of Hkv = 2 heads"),
        ((q, k.float(), v, layout), {}, TypeError, "k: expected dtype float64, got float32"),
        ((q, k, v.long(), layout), {}, TypeError, "v: expected dtype"),
        ((q, k, v.to("meta"), layout), {}, ValueError, "v: expected a tensor on cpu, got one on meta"),
        ((q, k, v, PackedLayout([2], [[1, 1]], "meta")), {}, ValueError, "layout: expected one on cpu"),
        ((q, k, v, layout), {"scale": 0.0}, ValueError, "scale: expected a finite number > 0"),
        ((q, k, v, layout), {"window": 0}, ValueError, "window: expected an int >= 1 or None"),
        ((q, k, v, layout), {"softcap": 0.0}, ValueError, "softcap: expected a finite number > 0"),
    ]:
        with pytest.raises(error, match=message):
            shared_prefix_attention(*arguments, **options)
