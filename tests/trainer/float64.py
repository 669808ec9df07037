"""transformers in float64, for tests that must not see rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def float64_throughout() -> Iterator[None]:
    """transformers computes norms, rotations, routers and eager softmax in fp32; here float64 stays float64."""
    to, product, softmax = torch.Tensor.to, torch.Tensor.__matmul__, torch.nn.functional.softmax

    def stays(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return x
        return to(x, *args, **kwargs)

    def wide(x: torch.Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        return softmax(x, *args, dtype=torch.float64 if x.dtype == torch.float64 else dtype, **kwargs)

    def promoting(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Rotations by frequencies @ positions, until transformers 5.23: positions are whole numbers, exact in fp32."""
        dtype = torch.promote_types(a.dtype, b.dtype)
        return product(to(a, dtype), to(b, dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", stays)
        patch.setattr(torch.Tensor, "float", lambda x: stays(x, torch.float32))
        patch.setattr(torch.Tensor, "__matmul__", promoting)
        patch.setattr(torch.nn.functional, "softmax", wide)
        yield
