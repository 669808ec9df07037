"""Inputs of `decode_attention`: pools with prompts that rows share and rows' own places, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels import decode_attention
from fastgrpo_kernels.decode_attention.reference import decode_attention_reference


def make(
    paths: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 2,
    repeat: int = 3,
    size: int = 16,
    group: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """paths: (prompt, own) kept tokens of each row; `group` rows after one another share the first one's prompt."""
    g = torch.Generator().manual_seed(seed)
    rows, rooms = len(paths), []
    prompts = [paths[b - b % group][0] for b in range(rows)]
    rooms += [("prompt", b, prompts[b]) for b in range(0, rows, group)]
    rooms += [("own", b, own + 2) for b, (_, own) in enumerate(paths)]
    begin: dict[tuple[str, int], int] = {}
    end = 3
    for i in torch.randperm(len(rooms), generator=g).tolist():
        kind, b, room = rooms[i]
        begin[kind, b] = end
        end += room
    keys, values = (torch.randn(end + 5, heads, size, generator=g).to(dtype) for _ in range(2))
    q = torch.randn(rows, heads * repeat, size, generator=g).to(dtype)
    k, v = (torch.randn(rows, heads, size, generator=g).to(dtype) for _ in range(2))
    return {
        "q": q, "k": k, "v": v, "keys": keys, "values": values,
        "where": torch.tensor(
            [
                [begin["prompt", b - b % group] for b in range(rows)],
                prompts,
                [begin["own", b] for b in range(rows)],
                [own for _, own in paths],
            ]
        ),
    }  # fmt: skip


PATHS = [(5, 0), (5, 7), (0, 0), (0, 3), (70, 1), (70, 64), (64, 63), (64, 200), (1, 130), (1, 0), (300, 0), (300, 310)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"window": 65},
    "window of 1": {"window": 1},
    "softcap": {"softcap": 2.0},
    "all": {"scale": 0.5, "window": 40, "softcap": 1.5},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_right(inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Output within rounding of the float64 reference; the new tokens in the pools, and nothing else touched."""
    longest = options.pop("longest", None)
    want, keys, values = decode_attention_reference(**inputs, **options)
    given = {name: x.clone() if name in ("keys", "values") else x for name, x in inputs.items()}
    out = decode_attention(**given, **options, longest=longest)
    assert out.dtype == inputs["q"].dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[out.dtype])
    assert torch.equal(given["keys"], keys)
    assert torch.equal(given["values"], values)
    return out
