# mypy: disable-error-code="no-untyped-def"
"""The coefficient kernel: from log-probs and entropies to the loss, its gradients and the metrics, in one launch.

One program per sequence walks the sequence's rows inside a window of rows, a block at a time. Rules that look at a
whole sequence (`LossConfig.needs_sequences`) take one walk more for its sums, and a second one where the gradient of
a sequence-level ratio is spread over its tokens; they need the sequence wholly inside the window. Every program adds
to its own line of a table, in stream order, and a last small kernel sums the lines in a fixed order: no atomics, and
the same windows give the same bits. The maths is in `kernel_terms`, advantages from rewards in `kernel_rewards`.
Log-probs, old, ref and sampling come in any float dtype but float64; a gradient of an untrained row is exactly 0.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec
from .config import LOSS_TYPES, LossConfig
from .kernel_metrics import (
    COLUMNS,
    ENTROPY,
    GAP_MAX,
    KL,
    LINE,
    POLICY_LOSS,
    RATIO_MAX,
    RATIO_MIN,
    clip_metrics,
    combine,
    count_rows,
    nothing,
    put,
    put_mean,
    sampling_metrics,
    sequence_correction_metrics,
    total,
)  # fmt: skip
from .kernel_rewards import group_advantage
from .kernel_terms import (
    ENTROPY_COEF,
    EPS,
    NUMBERS,
    Variant,
    load,
    sequence_terms,
    token_terms,
    token_weight,
    trained_rows,
)  # fmt: skip
from .output import METRICS, empty_metric

BLOCK = 512
NUM_WARPS = 8
FINISH_BLOCK = 128  # lines of the table

ROW_POINTERS = [  # of [N] tensors, which may start anywhere
    "p_logprob", "p_entropy", "p_old", "p_ref", "p_sampling", "p_mask", "p_advantage",
    "p_grad_logprob", "p_grad_entropy",
]  # fmt: skip


@triton.jit
def _mean_by_ratio(
    p_logprob, p_entropy, p_old, p_ref, p_sampling, p_mask, p_advantage, p_threshold, p_numbers, begin, end, length,
    advantage, ratio, correction, phi, stays, weight, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean over the sequence's trained tokens of dL/dw, fp32."""
    pull = tl.full((), 0.0, tl.float64)
    for block in range(begin, end, BLOCK):
        o_row = block + tl.arange(0, BLOCK)
        trained = trained_rows(p_mask, o_row, o_row < end)
        _, _, _, _, by_ratio, _, _, _, _, _, _ = token_terms(
            p_logprob, p_entropy, p_old, p_ref, p_sampling, p_advantage, p_threshold, p_numbers, o_row, trained,
            advantage, ratio, correction, phi, stays, weight, V,
        )  # fmt: skip
        pull += total(by_ratio, trained)
    return pull.to(tl.float32) / tl.maximum(length, 1).to(tl.float32)


@triton.jit
def _rows_of_sequence(
    p_logprob, p_entropy, p_old, p_ref, p_sampling, p_mask, p_advantage, p_threshold, p_numbers, p_grad_logprob,
    p_grad_entropy, first, last, end, advantage, ratio, correction, phi, stays, weight, entropy_weight, pulled,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of rows first:last, none of which trains from row `end` on; returns their metrics."""
    line = nothing(tl.arange(0, LINE))
    for block in range(first, last, BLOCK):
        o_row = block + tl.arange(0, BLOCK)
        trained = trained_rows(p_mask, o_row, (o_row < last) & (o_row < end))
        policy, kl_loss, kl, by_logp, by_ratio, w, slope, A, log_c, c, reported = token_terms(
            p_logprob, p_entropy, p_old, p_ref, p_sampling, p_advantage, p_threshold, p_numbers, o_row, trained,
            advantage, ratio, correction, phi, stays, weight, V,
        )  # fmt: skip
        grad = by_logp + pulled
        if V.token_level:
            grad += by_ratio * slope
        tl.store(p_grad_logprob + o_row, tl.where(trained, grad, 0.0), mask=o_row < last)
        if p_grad_entropy is not None:
            tl.store(p_grad_entropy + o_row, tl.where(trained, 0.0 - entropy_weight, 0.0), mask=o_row < last)

        b_line = clip_metrics(nothing(tl.arange(0, LINE)), trained, w, A, p_numbers)
        policy_loss = total(policy, trained)
        loss = policy_loss + total(kl_loss, trained)
        if p_entropy is not None:
            entropy = total(load(p_entropy, o_row, trained), trained)
            b_line = put_mean(b_line, ENTROPY, entropy, count_rows(trained))
            if V.entropy_bonus:
                loss -= entropy_weight.to(tl.float64) * entropy
        if p_ref is not None:
            b_line = put_mean(b_line, KL, total(kl, trained), count_rows(trained))
        if p_sampling is not None:
            b_line = sampling_metrics(b_line, log_c, c, reported, V)
        b_line = put(put(b_line, 0, loss), POLICY_LOSS, policy_loss)
        line = combine(tl.arange(0, LINE), line, b_line)
    return line


@triton.jit(do_not_specialize=["start", "stop"], do_not_specialize_on_alignment=ROW_POINTERS)
def coefficients_kernel(
    p_logprob,
    p_entropy,
    p_old,
    p_ref,
    p_sampling,
    p_mask,
    p_advantage,
    p_group_index,
    p_cu_seqlens,
    p_threshold,
    p_num_sequences,
    p_num_tokens,
    p_numbers,
    p_grad_logprob,
    p_grad_entropy,
    p_table,
    start,
    stop,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients [N] fp32 of the rows start:stop; [S, COLUMNS] float64 `p_table` takes in their metrics. Grid: (S,)."""
    i_sequence = tl.program_id(0)
    begin = tl.load(p_cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_sequence + 1).to(tl.int64)
    first, last = tl.maximum(begin, start), tl.minimum(end, stop)
    if first >= last:
        return
    advantage = 0.0
    if p_group_index is not None:
        eps = tl.load(p_numbers + EPS)
        advantage, valid = group_advantage(p_advantage, p_group_index, i_sequence, tl.num_programs(0), eps, V, BLOCK)
        end = tl.where(valid, end, begin)  # a failed sample trains no row
    elif V.per_sequence:
        advantage = tl.load(p_advantage + i_sequence).to(tl.float32)
    length, ratio, correction, phi, stays, pulled = (end - begin).to(tl.int32), 1.0, 1.0, 1.0, end >= 0, 0.0
    slope = 0.0
    if V.needs_lengths:
        length, ratio, slope, correction, phi, stays = sequence_terms(
            p_logprob, p_old, p_sampling, p_mask, p_advantage, p_numbers, begin, end, advantage, V, BLOCK
        )
    weight, tokens = token_weight(p_num_sequences, p_num_tokens, p_numbers, length, V)
    entropy_weight = (tl.load(p_numbers + ENTROPY_COEF) / tokens).to(tl.float32)
    if V.pulls:
        pulled = slope * _mean_by_ratio(
            p_logprob, p_entropy, p_old, p_ref, p_sampling, p_mask, p_advantage, p_threshold, p_numbers, begin, end,
            length, advantage, ratio, correction, phi, stays, weight, V, BLOCK,
        )  # fmt: skip
    line = _rows_of_sequence(
        p_logprob, p_entropy, p_old, p_ref, p_sampling, p_mask, p_advantage, p_threshold, p_numbers, p_grad_logprob,
        p_grad_entropy, first, last, end, advantage, ratio, correction, phi, stays, weight, entropy_weight, pulled, V,
        BLOCK,
    )  # fmt: skip
    if V.corrects_sequences:
        line = sequence_correction_metrics(line, correction, length)
    i_column = tl.arange(0, LINE)
    p_line = p_table + i_sequence.to(tl.int64) * COLUMNS + i_column
    before = tl.load(p_line, mask=i_column < COLUMNS, other=0.0)
    tl.store(p_line, combine(i_column, before, line), mask=i_column < COLUMNS)


@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["p_result"])
def finish_kernel(p_table, p_result, num_sequences, BLOCK: tl.constexpr):
    """[S, COLUMNS] -> [COLUMNS] float64. Grid: (1,)."""
    i_column = tl.arange(0, LINE)[None, :]
    empty = nothing(i_column)
    lines = tl.zeros((BLOCK, LINE), tl.float64) + empty
    for block in range(0, num_sequences, BLOCK):
        i_sequence = block + tl.arange(0, BLOCK)[:, None]
        mask = (i_sequence < num_sequences) & (i_column < COLUMNS)
        b_lines = tl.load(p_table + i_sequence.to(tl.int64) * COLUMNS + i_column, mask=mask, other=0.0)
        lines = combine(i_column, lines, tl.where(mask, b_lines, empty))
    i_column = tl.arange(0, LINE)
    is_max = (i_column == GAP_MAX) | (i_column == RATIO_MAX)
    extreme = tl.where(is_max, tl.max(lines, 0), tl.min(lines, 0))  # which drop a NaN
    extreme = tl.where(tl.max((lines != lines).to(tl.int32), 0) > 0, float("nan"), extreme)
    result = tl.where(is_max | (i_column == RATIO_MIN), extreme, tl.sum(lines, 0))
    tl.store(p_result + i_column, result, mask=i_column < COLUMNS)


@cache
def _numbers(config: LossConfig, eps: float, device: torch.device) -> Tensor:
    """[len(NUMBERS)] float64. Copied to the device by the first, warm-up call: a CUDA graph holds none of it."""
    (low, high), infinity = config.clip_range, math.inf
    values = {
        "clip_low": low,
        "clip_high": high,
        "delta": infinity if config.delta is None else config.delta,
        "beta": config.beta,
        "entropy_coef": config.entropy_coef,
        "off_policy": infinity if config.off_policy_mask_threshold is None else config.off_policy_mask_threshold,
        "c_min": config.sampling_clip_min or 0.0,
        "c_max": config.sampling_clip_max,
        "tau_pos": config.sapo_temperature_pos,
        "tau_neg": config.sapo_temperature_neg,
        "k_pos": config.vespo_k_pos,
        "lambda_pos": config.vespo_lambda_pos,
        "k_neg": config.vespo_k_neg,
        "lambda_neg": config.vespo_lambda_neg,
        "max_length": config.max_completion_length or 1,
        "eps": eps,
    }
    return torch.tensor([values[name] for name in NUMBERS], dtype=torch.float64, device=device)


@cache
def _empty_line(device: torch.device) -> Tensor:
    """[1, COLUMNS] float64, what a sequence adds before any of its rows was seen."""
    empty = [0.0, *map(empty_metric, METRICS)]
    return torch.tensor([empty], dtype=torch.float64, device=device)


class DeviceCoefficients:
    """The loss of one call, its rows arriving window by window; see `evaluate` for the maths. No host sync.

    advantage:   [S] advantages, with `per_token` [N]; with `group_index` [S] int64 the rewards [S], normalised here by
        `baseline` and `scale` (with `eps`) as `group_advantages` does; a NaN reward trains no row of its sample.
    cu_seqlens:  [S+1] int32, bounds of the sequences in the num_rows = N rows.
    old, ref, sampling: [N] or None. mask: [N] bool, None = every row trains.
    entropy_threshold: 0-d; needs the entropy in `rows`. A quantile of the tokens is for the caller to take.
    num_sequences, num_tokens: 0-d, denominators; nothing is taken off them here for failed samples.

    Floats of any dtype but float64 (the three 0-d tensors of any dtype at all), everything on one device.
    """

    def __init__(
        self,
        *,
        advantage: Tensor,
        per_token: bool,
        group_index: Tensor | None = None,
        baseline: str = "",
        scale: str = "",
        eps: float = 1e-4,
        cu_seqlens: Tensor,
        num_rows: int,
        old: Tensor | None,
        ref: Tensor | None,
        sampling: Tensor | None,
        mask: Tensor | None,
        entropy_threshold: Tensor | None,
        num_sequences: Tensor,
        num_tokens: Tensor,
        config: LossConfig,
    ) -> None:
        self._num_sequences = cu_seqlens.numel() - 1
        if group_index is None:
            baseline = scale = ""
        self._variant = Variant.of(config, per_token, baseline, scale)
        tensors = (old, ref, sampling, mask, advantage, group_index, cu_seqlens)
        dense = (None if x is None else x.contiguous() for x in tensors)
        device = cu_seqlens.device
        self._arguments = (*dense, entropy_threshold, num_sequences, num_tokens, _numbers(config, eps, device))
        self._empty = _empty_line(device)
        self._table = self._empty.repeat(self._num_sequences if num_rows else 0, 1)

    def rows(
        self,
        start: int,
        stop: int,
        logprob: Tensor,
        entropy: Tensor | None,
        grad_logprob: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Rows start:stop: their gradients are written, their loss and metrics kept. One launch; each row comes once.

        All tensors are [N] fp32, contiguous; of log-prob and entropy, start:stop is read where it trains. The window
        may cut a sequence only if not `config.needs_sequences`. grad_entropy: None where nobody wants it.
        """
        if start >= stop or self._num_sequences == 0:
            return
        with torch.cuda.device_of(logprob):
            coefficients_kernel[(self._num_sequences,)](
                logprob, entropy, *self._arguments, grad_logprob, grad_entropy, self._table, start, stop,
                self._variant, BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor]:
        """The loss, 0-d float64, and [len(METRICS)] float64 in the order of `METRICS`, once every row was seen."""
        # From the second element on, so that the metrics begin at 16 bytes: compiled code asserts that outputs do.
        result = self._empty.new_empty(1 + COLUMNS.value)[1:]
        if len(self._table) == 0:
            result.copy_(self._empty[0])
        else:
            with torch.cuda.device_of(result):
                finish_kernel[(1,)](self._table, result, self._num_sequences, FINISH_BLOCK, num_warps=NUM_WARPS)
        return result[0], result[1:]


def _spec(
    name: str, options: dict[str, Any], per_token: bool = False, rewards: tuple[str, str] | None = None
) -> KernelSpec:
    """The kernel with every tensor that it can take, half-precision ones where the caller's dtype decides."""
    config = LossConfig(**{"max_completion_length": 1, "epsilon_high": 5.0, **options})
    row, number = "*fp32", "*fp64:16"
    signature = {"p_logprob": row, "p_entropy": row, "p_grad_logprob": row, "p_grad_entropy": row}
    signature |= {"p_old": "*bf16", "p_ref": "*bf16", "p_sampling": row, "p_mask": "*i1", "p_advantage": row}
    signature |= {"p_cu_seqlens": "*i32:16", "p_threshold": number, "p_num_sequences": number, "p_num_tokens": number}
    signature |= {"p_numbers": number, "p_table": number, "start": "i32", "stop": "i32"}
    if rewards is not None:
        signature["p_group_index"] = "*i64:16"
    variant = Variant.of(config, per_token, *(rewards or ("", "")))
    return KernelSpec(
        name=f"coefficients_{name}",
        kernel=coefficients_kernel,
        signature=signature,
        constexprs={"V": variant, "BLOCK": BLOCK, **({} if rewards else {"p_group_index": None})},
        num_warps=NUM_WARPS,
        wide=False,  # a sequence starts at any row
    )


def _specs() -> list[KernelSpec]:
    """What selects code makes some ten thousand variants; listed is every choice once, the longest in company."""
    everything = {"beta": 0.1, "kl_bias_correction": True, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.1}
    pooled = {**everything, "importance_sampling_level": "sequence"}
    specs = [_spec(name, {"loss_type": name}) for name in LOSS_TYPES]
    specs += [_spec(kl, {"beta": 0.1, "kl_estimator": kl}) for kl in ("k1", "k2")]
    specs += [
        _spec(f"{mode}_{name}", {**options, "loss_type": name, "sampling_correction": mode}, per_token=True)
        for name, mode, options in (
            ("vespo", "token_truncate", pooled),
            ("dapo", "token_mask", everything),
            ("sapo", "sequence_truncate", pooled),
            ("grpo", "sequence_mask", pooled),
        )
    ]
    pairs = [("mean", scale) for scale in ("group", "batch", "none")]
    pairs += [("leave_one_out", "group"), ("none", "batch")]
    return specs + [_spec(f"{baseline}_{scale}", pooled, rewards=(baseline, scale)) for baseline, scale in pairs]


KERNELS = [
    *_specs(),
    KernelSpec(
        name="coefficients_finish",
        kernel=finish_kernel,
        signature={"p_table": "*fp64:16", "p_result": "*fp64", "num_sequences": "i32"},
        constexprs={"BLOCK": FINISH_BLOCK},
        num_warps=NUM_WARPS,
    ),
]
