"""Repairs bfloat16 in Triton's interpreter, so that what it computes there is what a GPU would.

The interpreter keeps a bfloat16 as its 16 bits, an integer. As it comes, `tl.dot` multiplies those integers, rounding
to bfloat16 truncates, casts to and from other types than float32 change the integer's value and not the number's, and
arithmetic adds bits. Here the dot and the casts become right; other arithmetic and reductions raise: our kernels cast
to float32 first. Bounds of loops become integers again where NumPy 2.5 and later refuse what Triton 3.6 asks of them.
Nothing else is repaired: dots of float32 are not rounded to TF32, and programs run one after the other, so that races
stay hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

_REFUSED = "arithmetic on bfloat16: cast to float32 first"


@functools.cache
def repair() -> None:
    """Patch the interpreter, once. `TRITON_INTERPRET=1` must have been set before triton was first imported."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle, convert = interpreter.TensorHandle, interpreter._convert_float
    cast, dot, check = builder.cast_impl, builder.create_dot, interpreter.ReduceScanOpInterface.check_tensor
    patch_tensor = interpreter._patch_lang_tensor

    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def widened(value: Any) -> Any:
        return handle(_from_bf16(value.data), tl.float32) if is_bf16(value) else value

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return _from_bf16(data).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16) and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return _to_bf16(data)
        return convert(data, source, target, rounding)

    def cast_impl(self: Any, value: Any, dtype: Any) -> Any:
        if is_bf16(value) != (dtype.scalar == tl.bfloat16) and tl.float32 not in (value.dtype.scalar, dtype.scalar):
            value = cast(self, value, tl.float32)
        return cast(self, value, dtype)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        return dot(self, widened(a), widened(b), accumulator, *options)

    def refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
        def refuse_bf16(self: Any, *operands: Any) -> Any:
            if np.where not in operands and any(isinstance(x, handle) and is_bf16(x) for x in operands):
                raise TypeError(_REFUSED)
            return operation(self, *operands)

        return refuse_bf16

    def check_tensor(self: Any, tensors: tuple[Any, ...]) -> None:
        if any(tensor.dtype == tl.bfloat16 for tensor in tensors):
            raise TypeError(_REFUSED)
        check(self, tensors)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._convert_float = convert_float
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
        setattr(builder, name, refusing(getattr(builder, name)))
    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, of two equally near ones the even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Just under half of the last place kept, and that place's own bit: an exact half rounds up only from an odd one.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(values))
