"""Modules with the names and signatures of the flash-attn packages 2.8, 3 and 4.0.0b36, and dense maths inside.

What they take and give was read in the packages' sources: names and order of the parameters, the number of results,
how a window without an end is written. What they assert is what the real ones assert.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from fastgrpo_kernels.shared_prefix_attention import flash_attn_3, flash_attn_4, packages

from .attention_cases import DenseVarlen

Modules = dict[str, dict[str, Any]]


def clear() -> None:
    """Forget what was found out about this machine."""
    for cached in (packages._problem, packages.capability, flash_attn_3._build_flags, flash_attn_4._too_old):
        cached.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, maths: DenseVarlen) -> None:
    """name: `flash_attn_2`, `flash_attn_3` or `flash_attn_4`. The caller clears once more when it is done."""
    for path, content in STAND_INS[name](maths).items():
        module = types.ModuleType(path)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, path, module)
    if name == "flash_attn_4":
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.0.0b36")
    clear()


def _write(to: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
    for t, grad in zip(to, grads, strict=True):
        assert (t.shape, t.dtype, t.is_contiguous()) == (grad.shape, grad.dtype, True)
        t.copy_(grad)


def _check_window(left: int, right: int, causal: bool) -> None:
    assert (left, right) == (-1, -1) or (causal and left >= 0 and right == 0)


def _version_2(maths: DenseVarlen) -> Modules:
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        _check_window(window_size_left, window_size_right, causal)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = maths.forward(q, k, v, bounds, causal, softmax_scale, window_size_left, softcap)
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes) == (0.0, None)
        _check_window(window_size_left, window_size_right, causal)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        x = (dout, q, k, v, out, softmax_lse)
        _write((dq, dk, dv), maths.backward(x, bounds, causal, softmax_scale, window_size_left, softcap))
        maths.calls[-1]["strict"] = deterministic
        return softmax_lse

    functions = (_flash_attn_varlen_forward, _flash_attn_varlen_backward)
    return {"flash_attn.flash_attn_interface": {f.__name__: f for f in functions}}


def _version_3(maths: DenseVarlen) -> Modules:
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert num_splits == 1
        _check_window(window_size_left, window_size_right, causal)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = maths.forward(q, k, v, bounds, causal, softmax_scale, window_size_left, softcap)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        _check_window(window_size_left, window_size_right, is_causal)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        x = (dout, q, k, v, out, softmax_lse)
        _write((dq, dk, dv), maths.backward(x, bounds, is_causal, softmax_scale, window_size_left, softcap))
        maths.calls[-1]["strict"] = deterministic
        return softmax_lse

    functions = (_flash_attn_forward, _flash_attn_backward)
    return {"flash_attn_interface": {f.__name__: f for f in functions}}


def _version_4(maths: DenseVarlen) -> Modules:
    def resolve(left: int | None, right: int | None, causal: bool) -> int:
        assert (left, right) == (None, None) or (causal and left is not None and left >= 0 and right == 0)
        return -1 if left is None else left

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
        q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        assert (num_splits, softcap) == (1, None)
        left = resolve(window_size_left, window_size_right, causal)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = maths.forward(q, k, v, bounds, causal, softmax_scale, left, 0.0)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):  # fmt: skip
        assert lse.shape == (q.shape[1], q.shape[0])
        assert (softcap, dlse) == (0.0, None)
        left = resolve(window_size_left, window_size_right, causal)
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _write((dq, dk, dv), maths.backward((dout, q, k, v, out, lse), bounds, causal, softmax_scale, left, 0.0))
        maths.calls[-1]["strict"] = deterministic
        return dq, dk, dv

    functions = (_flash_attn_fwd, _flash_attn_bwd)
    return {"flash_attn.cute.interface": {f.__name__: f for f in functions}}


STAND_INS: dict[str, Callable[[DenseVarlen], Modules]] = {
    "flash_attn_2": _version_2,
    "flash_attn_3": _version_3,
    "flash_attn_4": _version_4,
}
