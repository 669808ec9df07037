# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of `token_logprob`: one program a row, which it reads once in the forward and once in the backward.

Columns are counted from the last 16-byte boundary before the row, so that accesses are 128 bits wide also where rows
begin between boundaries (odd V). The row is [whole vectors of GROUP = 16 bytes] and [edges]: what it holds of the first
vector and of the last. Whole vectors are walked in tiles [BLOCK / GROUP, GROUP]; each of a tile's groups lies in one
thread and keeps running sums of its own, so the loop needs no barrier. No atomics: same input, same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec
from ..vocabulary import LogitHead

LOWEST = tl.constexpr(-3.4e38)  # a first maximum: unlike -inf, a logit of -inf minus it is not NaN
LOG_ZERO = tl.constexpr(-1e4)  # its exponential is 0: 0 * LOG_ZERO is 0 where 0 * -inf is NaN

# Of windows of rows that start anywhere: kernels would be compiled anew where one begins between 16-byte boundaries.
ROW_VECTORS = ["p_target", "p_logprob", "p_entropy", "p_peak", "p_log_sum", "p_d_logprob", "p_d_entropy"]


@triton.jit
def _tanh(a):
    """Cephes' tanhf, right near 0 too, where `1 - 2 / (exp(2a) + 1)` loses its digits."""
    a2 = a * a
    series = (-5.70498872745e-3 * a2 + 2.06390887954e-2) * a2 - 5.37397155531e-2
    small = ((series * a2 + 1.33314422036e-1) * a2 - 3.33332819422e-1) * a2 * a + a
    size = tl.abs(a)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, small, tl.where(a < 0, -large, large))


@triton.jit
def _load_scaled(p_row, o, mask, input_scale, ceiling, SOFTCAP: tl.constexpr):
    """`z` of the columns `o`, -inf where masked."""
    z = tl.load(p_row + o, mask=mask, other=float("-inf")).to(tl.float32) * input_scale
    if SOFTCAP:
        z = tl.where(mask, _tanh(z) * ceiling, float("-inf"))
    return z


@triton.jit
def _row_layout(stride, V, UNIT: tl.constexpr, GROUP: tl.constexpr):
    """Offset where column 0 is (int64); the columns where the row starts and ends; where its whole vectors end."""
    o_row = tl.program_id(0).to(tl.int64) * stride
    o_start = o_row // UNIT * UNIT
    lead = (o_row - o_start).to(tl.int32)
    end = lead + V
    return o_start, lead, end, tl.maximum(end // GROUP, 1) * GROUP


@triton.jit
def _edge_columns(lead, end, whole, GROUP: tl.constexpr):
    """[2 * GROUP] columns: the first vector, then the one after the whole ones; and which of them the row has."""
    o = tl.arange(0, 2 * GROUP)
    o = tl.where(o < GROUP, o, whole + o - GROUP)
    return o, (o >= lead) & (o < end)


@triton.jit(do_not_specialize=["stride", "V"], do_not_specialize_on_alignment=ROW_VECTORS)
def token_logprob_forward(
    p_logits,
    p_target,
    p_logprob,
    p_entropy,
    p_peak,
    p_log_sum,
    stride,
    V,
    input_scale,
    ceiling,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-prob of the target, entropy, max z and log sum exp(z - max z) of row `program_id(0)`."""
    i_row = tl.program_id(0).to(tl.int64)
    o_start, lead, end, whole = _row_layout(stride, V, UNIT, GROUP)
    p_row = p_logits + o_start
    o_tile = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # Of each group: the maximum m, s = sum exp(z - m), u = sum exp(z - m) * (z - m).
    m = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    s = tl.zeros([BLOCK // GROUP], tl.float32)
    u = tl.zeros([BLOCK // GROUP], tl.float32)
    for start in range(GROUP, whole, BLOCK):
        o = start + o_tile
        z = _load_scaled(p_row, o, o < whole, input_scale, ceiling, SOFTCAP)
        m_new = tl.maximum(m, tl.max(z, 1))
        shift = tl.maximum(m - m_new, LOG_ZERO)
        decay = tl.exp(shift)
        z -= m_new[:, None]
        e = tl.exp(z)
        u = decay * (u + shift * s) + tl.sum(e * tl.maximum(z, LOG_ZERO), 1)
        s = decay * s + tl.sum(e, 1)
        m = m_new

    o, mask = _edge_columns(lead, end, whole, GROUP)
    z = _load_scaled(p_row, o, mask, input_scale, ceiling, SOFTCAP)
    peak = tl.maximum(tl.max(m, 0), tl.max(z, 0))
    shift = tl.maximum(m - peak, LOG_ZERO)
    decay = tl.exp(shift)
    z -= peak
    e = tl.exp(z)
    total = tl.sum(decay * s, 0) + tl.sum(e, 0)
    weighted = tl.sum(decay * (u + shift * s), 0) + tl.sum(e * tl.maximum(z, LOG_ZERO), 0)
    log_sum = tl.log(total)

    y = tl.load(p_target + i_row)
    x_y = tl.load(p_row + lead + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
    z_y = x_y * input_scale
    if SOFTCAP:
        z_y = _tanh(z_y) * ceiling
    tl.store(p_logprob + i_row, z_y - peak - log_sum)
    tl.store(p_entropy + i_row, log_sum - weighted / total)
    tl.store(p_peak + i_row, peak)
    tl.store(p_log_sum + i_row, log_sum)


@triton.jit
def _store_gradient(
    p_row,
    p_out,
    o,
    mask,
    o_y,
    stop,
    peak,
    log_sum,
    entropy,
    d_logprob,
    d_entropy,
    input_scale,
    ceiling,
    slope,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """dL/dlogits of the columns `o`: 0, without a look at the logits, from column `stop` on."""
    live = o < stop
    z = tl.load(p_row + o, mask=mask & live, other=0.0).to(tl.float32) * input_scale
    if SOFTCAP:
        tanh = _tanh(z)
        z = tanh * ceiling
    logp = z - peak - log_sum
    upstream = d_logprob
    if ENTROPY:
        upstream += d_entropy * (tl.maximum(logp, LOG_ZERO) + entropy)
    grad = tl.where(o == o_y, d_logprob, 0.0) - tl.exp(logp) * upstream
    if SOFTCAP:
        grad *= 1.0 - tanh * tanh
    tl.store(p_out + o, tl.where(live, grad * slope, 0.0).to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride", "out_stride", "V"], do_not_specialize_on_alignment=ROW_VECTORS)
def token_logprob_backward(
    p_logits,
    p_target,
    p_peak,
    p_log_sum,
    p_entropy,
    p_d_logprob,
    p_d_entropy,
    p_d_logits,
    stride,
    out_stride,
    V,
    input_scale,
    ceiling,
    slope,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row `program_id(0)` of dL/dlogits; `p_d_entropy` is None where nothing comes from the entropy."""
    ENTROPY: tl.constexpr = p_d_entropy is not None
    i_row = tl.program_id(0).to(tl.int64)
    o_start, lead, end, whole = _row_layout(stride, V, UNIT, GROUP)
    p_row = p_logits + o_start
    p_out = p_d_logits + i_row * out_stride // UNIT * UNIT  # the same lead: UNIT is 1 where the strides do not allow it
    peak = tl.load(p_peak + i_row)
    log_sum = tl.load(p_log_sum + i_row)
    entropy = tl.load(p_entropy + i_row)
    d_logprob = tl.load(p_d_logprob + i_row)
    live = d_logprob != 0
    d_entropy = 0.0
    if ENTROPY:
        d_entropy = tl.load(p_d_entropy + i_row)
        live |= d_entropy != 0
    # Rows without an upstream gradient are live nowhere. The limit is a multiple of GROUP: loads stay wide.
    stop = tl.where(live, end // GROUP + 1, 0) * GROUP
    o_y = lead + tl.load(p_target + i_row)

    o_tile = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for start in range(GROUP, whole, BLOCK):
        o = start + o_tile
        _store_gradient(
            p_row, p_out, o, o < whole, o_y, stop, peak, log_sum, entropy,
            d_logprob, d_entropy, input_scale, ceiling, slope, SOFTCAP, ENTROPY,
        )  # fmt: skip
    o, mask = _edge_columns(lead, end, whole, GROUP)
    _store_gradient(
        p_row, p_out, o, mask, o_y, stop, peak, log_sum, entropy,
        d_logprob, d_entropy, input_scale, ceiling, slope, SOFTCAP, ENTROPY,
    )  # fmt: skip


def _tiling(
    itemsize: int, vocab_size: int, stride: int, softcap: bool, out_stride: int | None = None
) -> dict[str, int]:
    """The kernels' block sizes and number of warps for rows of `vocab_size` logits, `stride` apart.

    itemsize: of the logits, or of the gradient where that is smaller. out_stride: of the gradient; None = vocab_size.
    With a softcap long tiles are half as large: its tanh and derivative spilled registers on sm_100.
    """
    group = 16 // itemsize
    unit = group if (stride - (vocab_size if out_stride is None else out_stride)) % group == 0 else 1
    if vocab_size < 1024 * group:
        return {"UNIT": unit, "GROUP": group, "BLOCK": 256 * group, "num_warps": 4}
    return {"UNIT": unit, "GROUP": group, "BLOCK": (512 if softcap else 1024) * group, "num_warps": 8}


def _rows(logits: Tensor) -> Tensor:
    """The logits with columns side by side: itself where they are, else a copy."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def forward(logits: Tensor, target: Tensor, head: LogitHead) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, V] fp16, bf16 or fp32, [N] int64 -> logprob, entropy, peak, log_sum, each [N] fp32.

    `peak + log_sum` is the log-sum-exp, kept apart because their sum is too coarse for the gradient of logits of 1e4.
    A target outside [0, V) gives a log-prob of NaN.
    """
    logits, target = _rows(logits), target.contiguous()
    (N, V), stride = logits.shape, logits.stride(0)
    logprob, entropy, peak, log_sum = (logits.new_empty(N, dtype=torch.float32) for _ in range(4))
    if N:
        with torch.cuda.device_of(logits):
            token_logprob_forward[(N,)](
                logits,
                target,
                logprob,
                entropy,
                peak,
                log_sum,
                stride,
                V,
                head.input_scale,
                0.0 if head.softcap is None else head.ceiling,
                SOFTCAP=head.softcap is not None,
                **_tiling(logits.element_size(), V, stride, head.softcap is not None, stride),  # reads one row only
            )
    return logprob, entropy, peak, log_sum


def backward(
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    head: LogitHead,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, [N, V] contiguous, in their dtype; `d_entropy` is None when the loss has none.

    It goes into `out`, if given: [N, V] fp16, bf16 or fp32, columns side by side, no memory shared with the logits;
    what lies between its rows stays. Accesses are wide where the row strides differ by a multiple of 16 bytes of both.
    """
    logits = _rows(logits)
    (N, V), stride = logits.shape, logits.stride(0)
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    itemsize, softcap = min(logits.element_size(), d_logits.element_size()), head.softcap is not None
    if N:
        with torch.cuda.device_of(logits):
            token_logprob_backward[(N,)](
                logits,
                target.contiguous(),
                peak,
                log_sum,
                entropy,
                d_logprob.contiguous(),
                None if d_entropy is None else d_entropy.contiguous(),
                d_logits,
                stride,
                d_logits.stride(0),
                V,
                head.input_scale,
                0.0 if head.softcap is None else head.ceiling,
                head.slope,
                SOFTCAP=softcap,
                **_tiling(itemsize, V, stride, softcap, d_logits.stride(0)),
            )
    return d_logits


def _specs() -> list[KernelSpec]:
    """Every variant: softcap or not, entropy gradient or not, long, short and unaligned rows. fp16 is as bf16."""
    specs = []
    row, number = "*fp32", "fp32"
    for dtype, out, itemsize in (("bf16", "bf16", 2), ("fp32", "fp32", 4), ("fp32", "bf16", 2)):
        for size, V, stride in (("", 1 << 17, 1 << 17), ("_short", 512, 512), ("_unaligned", 1 << 17, (1 << 17) + 1)):
            for softcap in (False, True):
                tiling = _tiling(itemsize, V, stride, softcap)
                warps = tiling.pop("num_warps")
                name = f"{dtype}{'' if out == dtype else f'_{out}'}{size}{'_softcap' if softcap else ''}"
                constexprs = {"SOFTCAP": softcap, **tiling}
                common = {"p_logits": f"*{dtype}:16", "p_target": "*i64"}
                common |= dict.fromkeys(("p_peak", "p_log_sum", "p_entropy"), row)
                common |= {"stride": "i32", "V": "i32", "input_scale": number, "ceiling": number}
                if out == dtype:
                    specs.append(
                        KernelSpec(
                            name=f"token_logprob_forward_{name}",
                            kernel=token_logprob_forward,
                            signature={**common, "p_logprob": row},
                            constexprs=constexprs,
                            num_warps=warps,
                            wide=tiling["UNIT"] > 1,
                        )
                    )
                for entropy in (False, True):
                    signature = {**common, "p_d_logprob": row, "p_d_logits": f"*{out}:16"}
                    signature |= {"out_stride": "i32", "slope": number}
                    specs.append(
                        KernelSpec(
                            name=f"token_logprob_backward_{name}{'_entropy' if entropy else ''}",
                            kernel=token_logprob_backward,
                            signature={**signature, **({"p_d_entropy": row} if entropy else {})},
                            constexprs={**constexprs, **({} if entropy else {"p_d_entropy": None})},
                            num_warps=warps,
                            wide=tiling["UNIT"] > 1,
                        )
                    )
    return specs


KERNELS = _specs()
