"""`decode_attention` in Triton's interpreter: paths of any length, split or not, layouts, head sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgrpo_kernels import decode_attention
from fastgrpo_kernels.decode_attention import kernel

from .decode_cases import OPTIONS, PATHS, assert_right, make

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    """With 12 rows of two heads and paths of up to 610 tokens a row is worth four pieces, with windows one."""
    whole = assert_right(make(PATHS, dtype), **options, longest=0)
    split = assert_right(make(PATHS, dtype), **options, longest=1000)
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("heads", "repeat", "size"), [(1, 1, 1), (2, 7, 64), (1, 17, 20), (1, 2, 128), (3, 1, 80)])
@pytest.mark.parametrize("longest", [0, 2000])
def test_any_heads(heads: int, repeat: int, size: int, longest: int) -> None:
    inputs = make([(40, 70), (40, 0), (3, 300)], heads=heads, repeat=repeat, size=size)
    assert_right(inputs, longest=longest)


def test_half_precision_and_large_heads() -> None:
    assert_right(make([(40, 70), (40, 0)], torch.float16, size=256))


def test_more_pieces_than_blocks() -> None:
    """Pieces behind the end of a path count nothing."""
    assert kernel.pieces_of(1, 1, 100_000) == kernel.MAX_PIECES
    assert_right(make([(200, 100)], heads=1), longest=100_000)


def test_pieces_fill_a_gpu_and_no_more() -> None:
    assert kernel.pieces_of(512, 2, 4096) == 1
    assert kernel.pieces_of(32, 2, 4096) == 8
    assert kernel.pieces_of(32, 2, 600) == 4
    assert kernel.pieces_of(32, 2, 256) == kernel.pieces_of(1, 1, 0) == 1


def test_views() -> None:
    """As a model gives them: heads before rows, and rows of a fused projection."""
    inputs = make([(5, 7), (5, 0), (9, 3)])
    plain = decode_attention(**{n: x.clone() for n, x in inputs.items()})
    by_head = inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([inputs["k"], inputs["v"]], 1)
    apart = inputs["q"].repeat_interleave(2, 2)[..., ::2]
    for change in ({"q": by_head}, {"k": fused[:, :2], "v": fused[:, 2:]}, {"q": apart}):
        given = {n: x.clone() if n in ("keys", "values") else x for n, x in (inputs | change).items()}
        assert torch.equal(decode_attention(**given), plain)
    for where in (inputs["where"].T.contiguous().T, torch.cat([inputs["where"]] * 2, 1)[:, :3]):
        given = {n: x.clone() if n in ("keys", "values") else x for n, x in (inputs | {"where": where}).items()}
        assert torch.equal(decode_attention(**given), plain)


def test_rows_do_not_depend_on_one_another() -> None:
    inputs = make(PATHS)
    pools = ("keys", "values")
    all_rows = decode_attention(**{n: x.clone() for n, x in inputs.items()}, longest=0)
    for b in (0, 5, 11):
        alone = {n: x.clone() if n in pools else x[b : b + 1] for n, x in inputs.items() if n != "where"}
        alone["where"] = inputs["where"][:, b : b + 1]
        assert torch.equal(decode_attention(**alone, longest=0)[0], all_rows[b])


def test_a_nan_stays_in_its_row() -> None:
    inputs = make([(5, 7), (5, 2), (4, 4)])
    clean = decode_attention(**{n: x.clone() for n, x in inputs.items()})
    inputs["values"][inputs["where"][2, 1]] = float("nan")
    out = decode_attention(**inputs)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


def test_places_past_two_to_the_31_elements(tmp_path: Any) -> None:
    """Pools of which a row's own places begin where an int32 offset has wrapped round."""
    heads, size = 1, 16
    inputs = make([(5, 7), (5, 2)], torch.bfloat16, heads=heads, size=size)
    want = decode_attention(**{n: x.clone() for n, x in inputs.items()}, longest=64)
    far, small = (1 << 31) // size + 3, inputs["keys"].shape[0]
    pools = {
        n: torch.from_file(
            str(tmp_path / n), shared=True, size=(far + small) * heads * size, dtype=torch.bfloat16
        ).view(-1, heads, size)
        for n in ("keys", "values")
    }
    for n, pool in pools.items():
        pool[far:] = inputs[n]
    shifted = {"where": inputs["where"] + torch.tensor([far, 0, far, 0])[:, None]}
    # The op would ask for the pool's own length; a GPU's caller knows how long paths are.
    got = decode_attention(**(inputs | pools | shifted), longest=64)
    assert torch.equal(got, want)


def test_every_kernel_is_listed_once() -> None:
    assert len({spec.name for spec in kernel.KERNELS}) == len(kernel.KERNELS)
