"""`decode_attention` on the PyTorch path, against the float64 reference and against whole causal attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgrpo_kernels import decode_attention
from fastgrpo_kernels.decode_attention.reference import decode_attention_reference

from .decode_cases import OPTIONS, PATHS, assert_right, make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_right(make(PATHS, dtype), **options)


def test_token_by_token_it_is_causal_attention() -> None:
    """Rows grown from nothing behind a shared prompt give what one causal pass over prompt and row gives."""
    torch.manual_seed(0)
    heads, repeat, size, prompt, tokens = 2, 2, 8, 6, 5
    q = torch.randn(2, tokens, heads * repeat, size, dtype=torch.float64)
    k, v = (torch.randn(2, tokens, heads, size, dtype=torch.float64) for _ in range(2))
    keys, values = (torch.randn(40, heads, size, dtype=torch.float64) for _ in range(2))
    first = keys[10 : 10 + prompt].clone(), values[10 : 10 + prompt].clone()
    got = torch.stack(
        [
            decode_attention(
                q[:, t], k[:, t], v[:, t], keys, values,
                torch.tensor([[10, 10], [prompt, prompt], [20, 30], [t, t]]),
            )
            for t in range(tokens)
        ],
        1,
    )  # fmt: skip
    for b in range(2):
        whole_k, whole_v = (torch.cat([p, x[b]]).transpose(0, 1) for p, x in zip(first, (k, v), strict=True))
        mask = torch.ones(tokens, prompt + tokens, dtype=torch.bool).tril(prompt)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b].transpose(0, 1), whole_k, whole_v, mask, enable_gqa=True
        )
        torch.testing.assert_close(got[b], want.transpose(0, 1), rtol=0, atol=1e-12)


def test_no_rows() -> None:
    inputs = make([(3, 2)])
    inputs |= {name: inputs[name][:0] for name in "qkv"} | {"where": inputs["where"][:, :0]}
    assert decode_attention(**inputs).shape == (0, 6, 16)


def test_opcheck() -> None:
    inputs = make([(3, 2), (3, 0)])
    torch.library.opcheck(
        torch.ops.fastgrpo.decode_attention.default, (*inputs.values(), 0.25, None, None, 64),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 16)}, ValueError, "q: expected a positive multiple of Hkv heads, got 5; k has 2"),
        ({"q": torch.zeros(2, 6)}, ValueError, r"q: expected shape \[B, Hq, d\]"),
        ({"q": torch.zeros(2, 6, 16, dtype=torch.int64)}, TypeError, "q: expected dtype"),
        ({"k": torch.zeros(2, 2, 16).double()}, TypeError, "k: expected dtype float32"),
        ({"v": torch.zeros(2, 1, 16)}, ValueError, "q: expected a positive multiple of Hkv heads, got 6; k has 2, v 1"),
        ({"keys": torch.zeros(9, 2, 17)[..., :16]}, ValueError, "keys: expected a contiguous tensor"),
        ({"values": torch.zeros(9, 2, 16)}, ValueError, "values: expected as many places as keys"),
        ({"where": torch.zeros(4, 2, dtype=torch.int32)}, TypeError, "where: expected dtype int64"),
        ({"where": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, r"where: expected shape \[4, B\]"),
        ({"where": torch.tensor([[0, 0], [1, 1], [3, 4], [10**6, 0]])}, ValueError, "where: expected places within"),
        ({"where": torch.tensor([[-1, 0], [1, 1], [3, 4], [0, 0]])}, ValueError, "where: expected places within"),
        ({"scale": 0.0}, ValueError, "scale: expected a finite number > 0"),
        ({"window": 0}, ValueError, "window: expected an int >= 1"),
        ({"softcap": float("nan")}, ValueError, "softcap: expected a finite number"),
        ({"longest": -1}, ValueError, "longest: expected an int >= 0"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode_attention(**{**make([(3, 2), (3, 0)]), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("heads", "repeat", "size"), [(2, 7, 64), (8, 4, 128), (4, 2, 256), (3, 1, 80)])
def test_on_a_gpu(heads: int, repeat: int, size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Whole and in pieces; as near as plain PyTorch; without waiting, captured, bitwise the same 50 times."""
    paths = [*PATHS, *[(600, 17 * i) for i in range(40)]]
    cpu = make(paths, dtype, heads=heads, repeat=repeat, size=size, group=4)
    want, keys, values = decode_attention_reference(**cpu, **options)
    plain = decode_attention(**{n: x.clone() for n, x in cpu.items()}, **options)
    allowed = 2 * (plain.double() - want).abs().max().item() + 1e-6
    for longest in (0, 4000):
        inputs = {n: x.cuda() for n, x in cpu.items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = decode_attention(**inputs, **options, longest=longest)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (out.cpu().double() - want).abs().max().item() <= allowed
        assert torch.equal(inputs["keys"].cpu(), keys)
        assert torch.equal(inputs["values"].cpu(), values)
        for _ in range(50):
            assert torch.equal(decode_attention(**inputs, **options, longest=longest), out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = decode_attention(**inputs, **options, longest=longest)
        graph.replay()
        assert torch.equal(again, out)


@pytest.mark.gpu
def test_a_pool_of_more_than_2_to_the_31_numbers_on_a_gpu() -> None:
    inputs = {n: x.cuda() for n, x in make([(70, 64), (70, 3)], torch.bfloat16, size=128).items()}
    want = decode_attention(**inputs, longest=200)
    far, small = (1 << 31) // (2 * 128) + 5, inputs["keys"].shape[0]
    pools = {n: torch.zeros(far + small, 2, 128, dtype=torch.bfloat16, device="cuda") for n in ("keys", "values")}
    for n, pool in pools.items():
        pool[far:] = inputs[n]
    shifted = inputs["where"] + torch.tensor([far, 0, far, 0], device="cuda")[:, None]
    assert torch.equal(decode_attention(**(inputs | pools | {"where": shifted}), longest=200), want)
