"""Argument checks shared by the public ops, run before any work; they name the argument, what it is, what was expected.

Public functions look at what the host knows, which torch.compile can trace; values are looked at within the ops.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

INT_LIMIT = 1 << 63
"""Python's integers know no limit; those of an op do."""


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int | None, ...],
    layout: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise unless `value` is a tensor of `shape` (None = any size), `dtype` (None = a float type) and `device`.

    layout: how the documentation writes the shape, such as "[N, D]"; used in messages only.
    Errors: TypeError for something that is no dense tensor, has the wrong dtype or carries a forward-mode tangent,
    ValueError for shape and device.
    """
    expected = "float16, bfloat16, float32 or float64" if dtype is None else str(dtype).removeprefix("torch.")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {layout} and dtype {expected}, got {type(value).__name__}")
    _check_whole(name, value, len(shape))
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor of shape {layout}, got a {kind} one")
    if value.dtype not in (FLOAT_DTYPES if dtype is None else (dtype,)):
        raise TypeError(f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape {layout} = [{sizes}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    _check_no_tangent(name, value)


def _check_whole(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise TypeError for a tensor of which this process holds a part only."""
    if type(tensor).__name__ == "DTensor" or hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; gather it first, as with "
            '`full_tensor(grad_placements=[Partial("avg")])`, without which the other ranks\' gradients are lost'
        )
    if hasattr(tensor, "ds_id"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a parameter sharded by DeepSpeed ZeRO-3; gather it first"
        )
    sharded = getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_is_sharded", False)
    if sharded or (getattr(tensor, "_fsdp_flattened", False) and tensor.ndim < ndim):
        raise TypeError(f"{name}: expected a plain tensor, got one sharded by FSDP; gather it first")


def _check_no_tangent(name: str, value: Tensor) -> None:
    """Custom ops have no forward-mode derivative, and without this drop the tangent: a derivative of 0."""
    if not torch.compiler.is_compiling() and unpack_dual(value).tangent is not None:
        raise TypeError(
            f"{name}: expected a tensor without a tangent, got a dual tensor: there are gradients (backward), but no "
            "forward-mode derivatives (jvp, jacfwd)"
        )


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high], or (low, high] with `open_low`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not math.isfinite, which fails on integers that no float can hold.
    finite = number and -sys.float_info.max <= value <= sys.float_info.max
    if not finite or not low <= value <= high or (open_low and value == low):
        left = "" if low == -math.inf else f" {'>' if open_low else '>='} {low:g}"
        right = "" if high == math.inf else f"{' and' if left else ''} <= {high:g}"
        raise ValueError(f"{name}: expected a finite number{left}{right}, got {value!r}")


def check_int(name: str, value: Any, low: int) -> None:
    """Raise ValueError unless `value` is an int in [low, 2^63), or None."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < INT_LIMIT:
        raise ValueError(f"{name}: expected an int >= {low} or None{_limit(value)}, got {value!r}")


def _limit(value: Any) -> str:
    return " below 2^63" if isinstance(value, int) and value >= INT_LIMIT else ""


def check_bool(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:  # an array would compare element by element
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_cu_seqlens(cu_seqlens: Any, device: torch.device) -> None:
    """Raise unless `cu_seqlens` is [S+1] int32 on `device`."""
    check_tensor("cu_seqlens", cu_seqlens, (None,), "[S+1]", torch.int32, device)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens: expected shape [S+1] with S >= 0, got [0]")


def check_cu_seqlens_values(cu_seqlens: Tensor, num_rows: int) -> None:
    """Raise unless the values rise from 0 to `num_rows`; on the CPU only.

    On other devices reading the values would stall the queue, so a wrong content is the caller's to avoid there.
    """
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != num_rows or any(a > b for a, b in pairwise(bounds)):
            shown = bounds if len(bounds) <= 12 else f"{bounds[:6]} ... {bounds[-3:]}"
            raise ValueError(f"cu_seqlens: expected values rising from 0 to N = {num_rows}, got {shown}")


def check_target(target: Any, num_rows: int, device: torch.device) -> None:
    """Raise unless `target` is [N] int64 on `device`."""
    check_tensor("target", target, (num_rows,), "[N]", torch.int64, device)


def check_target_values(target: Tensor, vocab_size: int) -> None:
    """Raise unless the targets are in [0, V); on the CPU only, for the reason above."""
    if target.device.type == "cpu" and target.numel():
        low, high = int(target.min()), int(target.max())
        if not 0 <= low <= high < vocab_size:
            raise ValueError(
                f"target: expected token ids in [0, V) with V = {vocab_size}, got values in [{low}, {high}]"
            )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any of the tensors is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
