"""`shared_prefix_attention` and `why_not_flash`: the public functions, the op, and the op of its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_number, check_tensor, compute_dtype
from ..layout import AttentionRanges, PackedLayout
from . import backends
from .options import Options


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention in which all completions of a prompt read one copy of its keys and values. Exact.

    q: [T, Hq, d], k and v: [T, Hkv, d], of one float dtype, Hq a multiple of Hkv; views are taken as they are. Rows lie
    as `layout` says, which must be on the same device. Prompts attend causally to themselves; a completion causally to
    itself and to all of its prompt. Sequences that share nothing are prompts without completions and cost plain
    variable-length attention; so does a lone prompt with one completion.
    scale: > 0, multiplies the scores, d^-0.5 by default. window: a row sees the last `window` rows of its path, itself
    included. softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns [T, Hq, d], contiguous, differentiable in q, k and v; gradients are bitwise repeatable. CPU: PyTorch's flash
    kernels, once per range. GPU, fp16 and bf16: the newest of the flash-attn packages (4, 3, 2) that takes the device,
    head size and options, else PyTorch's own kernels (backends.py); other dtypes and head sizes, and a softcap on the
    CPU, take plain matrix products, whose work is T^2. Under autocast q, k and v are cast to its dtype.
    Errors: TypeError or ValueError naming the argument, also for a window or softcap that the kernels cannot do.
    """
    _check(q, k, v, layout)
    q, k, v = (_autocast(x) for x in (q, k, v))
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, tuple(k.shape), "[T, Hkv, d]", q.dtype)
    if scale is not None:
        check_number("scale", scale, 0, open_low=True)  # the flash kernels mask before they scale: 0 * -inf
    check_int("window", window, 1)
    if softcap is not None:
        check_number("softcap", softcap, 0, open_low=True)
    r = layout.attention
    out, _ = _attention(
        q, k, v, r.position_ids, r.cu_self, r.cu_query, r.cu_key, r.unasked,
        r.max_self, r.max_query, r.max_key, r.first_query, r.num_queries, r.num_keys,
        q.shape[2] ** -0.5 if scale is None else float(scale), _active(window, layout), softcap,
    )  # fmt: skip
    return out


def why_not_flash(
    q: Tensor, layout: PackedLayout, *, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None when fused flash kernels run this call of `shared_prefix_attention`, else the reason why not.

    The call then takes plain matrix products, or raises ValueError with the same reason: a window over shared prompts,
    a softcap that no kernel here has. Arguments as in the call, which are not checked; of q only its form is read.
    """
    options = Options(1.0, _active(window, layout), softcap)
    return backends.why_not_flash(_autocast(q[:1]), layout.attention, options)


def _active(window: int | None, layout: PackedLayout) -> int | None:
    return None if window is None or window >= layout.longest else window


def _check(q: Any, k: Any, v: Any, layout: Any) -> None:
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"layout: expected a PackedLayout, got {type(layout).__name__}")
    check_tensor("q", q, (layout.num_tokens, None, None), "[T, Hq, d]")
    check_tensor("k", k, (layout.num_tokens, None, q.shape[2]), "[T, Hkv, d]", device=q.device)
    check_tensor("v", v, tuple(k.shape), "[T, Hkv, d]", device=q.device)
    if min(q.shape[1:]) == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected a positive multiple of Hkv = {k.shape[1]} heads, got {list(q.shape)}")
    if layout.position_ids.device != q.device:
        raise ValueError(f"layout: expected one on {q.device}, got one on {layout.position_ids.device}")


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


@torch.library.custom_op("fastgrpo::shared_prefix_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    cu_self: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    unasked: Tensor,
    max_self: int,
    max_query: int,
    max_key: int,
    first_query: int,
    num_queries: int,
    num_keys: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out, and the log-sum-exp [Hq, T] of the scores."""
    ranges = AttentionRanges(
        position_ids, cu_self, cu_query, cu_key, unasked,
        max_self, max_query, max_key, first_query, num_queries, num_keys,
    )  # fmt: skip
    if q.shape[0] == 0:
        return q.new_zeros(q.shape), q.new_zeros((q.shape[1], 0), dtype=compute_dtype(q))
    return backends.forward(q, k, v, ranges, Options(scale, window, softcap))


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q))


@torch.library.custom_op("fastgrpo::shared_prefix_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    position_ids: Tensor,
    cu_self: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    unasked: Tensor,
    max_self: int,
    max_query: int,
    max_key: int,
    first_query: int,
    num_queries: int,
    num_keys: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: all three at once, as the kernels make them."""
    ranges = AttentionRanges(
        position_ids, cu_self, cu_query, cu_key, unasked,
        max_self, max_query, max_key, first_query, num_queries, num_keys,
    )  # fmt: skip
    if q.shape[0] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    return backends.backward(dout, q, k, v, out, lse, ranges, Options(scale, window, softcap))


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], out, lse, *inputs[3:8])
    ctx.numbers = inputs[8:]


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 17
    grads = _attention_backward(dout, *ctx.saved_tensors, *ctx.numbers)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:3], strict=True)), *[None] * 14


_attention.register_autograd(_backward, setup_context=_save)
