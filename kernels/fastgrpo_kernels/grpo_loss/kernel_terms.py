# mypy: disable-error-code="no-untyped-def"
"""The maths of the coefficient kernel, as functions that Triton inlines: what `evaluate` computes, block by block.

Loads are masked by `trained`, so a row that does not train reads as 0 and what it holds is never seen. Clamps are
written with comparisons, which keep a NaN, as PyTorch's do: a broken log-prob must show in the loss. Sums over a
sequence are float64, everything per token is fp32. Which code is compiled depends on a `Variant`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .config import CLIPPED, LossConfig
from .reference import LOG_RATIO_CLAMP, LOG_WEIGHT_MIN

LIMIT = tl.constexpr(LOG_RATIO_CLAMP)
LOG_MIN = tl.constexpr(LOG_WEIGHT_MIN)

NUMBERS = (
    "clip_low", "clip_high", "delta", "beta", "entropy_coef", "off_policy", "c_min", "c_max", "tau_pos", "tau_neg",
    "k_pos", "lambda_pos", "k_neg", "lambda_neg", "max_length", "eps",
)  # fmt: skip
"""What stands where in the device tensor that holds the numbers of a config."""

CLIP_LOW, CLIP_HIGH, DELTA, BETA, ENTROPY_COEF, OFF_POLICY, C_MIN, C_MAX = map(tl.constexpr, range(8))
TAU_POS, TAU_NEG, K_POS, LAMBDA_POS, K_NEG, LAMBDA_NEG, MAX_LENGTH, EPS = map(tl.constexpr, range(8, 16))


@dataclass(frozen=True, repr=False)
class Variant:
    """What selects code in the coefficient kernel: its compile-time argument. Kernels read its attributes.

    kl_term: `none` (beta = 0, the estimate is a metric only), `plain` or `bias` (multiplied by the ratio).
    baseline, scale: of group rewards, "" where the advantages are given; per_token: those are [N].
    """

    loss_type: str
    token_level: bool
    kl_estimator: str
    kl_term: str
    correction: str
    off_policy: bool
    entropy_bonus: bool
    per_token: bool
    baseline: str
    scale: str

    @classmethod
    def of(cls, config: LossConfig, per_token: bool = False, baseline: str = "", scale: str = "") -> Variant:
        return cls(
            loss_type=config.loss_type,
            token_level=config.importance_sampling_level == "token",
            kl_estimator=config.kl_estimator,
            kl_term="none" if config.beta == 0 else "bias" if config.kl_bias_correction else "plain",
            correction=config.sampling_correction,
            off_policy=config.off_policy_mask_threshold is not None,
            entropy_bonus=config.entropy_coef != 0,
            per_token=per_token,
            baseline=baseline,
            scale=scale,
        )

    @property
    def pooled(self) -> bool:
        """One ratio a sequence."""
        return not self.token_level

    @property
    def per_sequence(self) -> bool:
        return not self.per_token

    @property
    def clipped(self) -> bool:
        return self.loss_type in CLIPPED

    @property
    def by_sequence(self) -> bool:
        """Terms of the aggregation are means over a sequence."""
        return self.loss_type in ("grpo", "sapo")

    @property
    def corrects_sequences(self) -> bool:
        return self.correction.startswith("sequence")

    @property
    def corrects_tokens(self) -> bool:
        return self.correction.startswith("token")

    @property
    def truncates(self) -> bool:
        return self.correction.endswith("truncate")

    @property
    def needs_sequences(self) -> bool:
        """`LossConfig.needs_sequences`."""
        return self.pooled or self.off_policy or self.corrects_sequences or self.loss_type == "vespo"

    @property
    def needs_lengths(self) -> bool:
        return self.by_sequence or self.needs_sequences

    @property
    def pulls(self) -> bool:
        """The gradient of the ratio of a whole sequence is not 0 throughout."""
        return self.pooled and (self.clipped or self.loss_type == "sapo" or self.kl_term == "bias")

    def __repr__(self) -> str:
        """Only letters, digits and underscores: Triton makes it a part of function names."""
        flags = ("token_level", "off_policy", "entropy_bonus", "per_token")
        switches = (f"{name}{int(getattr(self, name))}" for name in flags)
        choices = (self.loss_type, self.kl_estimator, self.kl_term, self.correction, self.baseline, self.scale)
        return "_".join(["Variant", *switches, *choices])


@triton.jit
def number(p_numbers, which: tl.constexpr):
    """One of `NUMBERS`, fp32."""
    return tl.load(p_numbers + which).to(tl.float32)


@triton.jit
def load(p, o_row, mask):
    """[BLOCK] fp32, 0 where masked."""
    return tl.load(p + o_row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def trained_rows(p_mask, o_row, inside):
    """Which of the rows `inside` train."""
    if p_mask is None:
        return inside
    else:
        return inside & tl.load(p_mask + o_row, mask=inside, other=0).to(tl.int1)


@triton.jit
def old_logprob(p_old, logp, o_row, trained):
    """Log-probs of the policy that started the update; on-policy the current ones."""
    if p_old is None:
        return logp
    else:
        return load(p_old, o_row, trained)


@triton.jit
def gap_to_engine(p_sampling, old, o_row, trained):
    """`old - samp`, 0 where the engine did not report; which tokens it reported."""
    samp = load(p_sampling, o_row, trained)
    reported = trained & (samp == samp)
    return tl.where(reported, old - samp, 0.0), reported


@triton.jit
def _bounded_correction(log_c, p_numbers, V: tl.constexpr):
    """`exp(log_c)`, clamped to [C_min, C] or 0 outside of it."""
    c, low, high = tl.exp(log_c), number(p_numbers, C_MIN), number(p_numbers, C_MAX)
    if V.truncates:
        return clamp(c, low, high)
    else:
        return tl.where((c >= low) & (c <= high), c, 0.0)


@triton.jit
def token_correction(log_c, reported, p_numbers, V: tl.constexpr):
    """[BLOCK], of the token modes."""
    return tl.where(reported, _bounded_correction(log_c, p_numbers, V), 1.0)


@triton.jit
def _sequence_sums(
    p_logprob, p_old, p_sampling, p_mask, p_advantage, p_numbers, begin, end, V: tl.constexpr, BLOCK: tl.constexpr
):
    """Over the trained tokens of rows begin:end: their number, and float64 sums.

    The sums: r, vespo's clamped r, the log of the sampling correction (of vespo clamped), samp - logp, A.
    """
    b_length = tl.zeros((BLOCK,), tl.int32)
    b_ratio = tl.zeros((BLOCK,), tl.float64)
    b_clamped = tl.zeros((BLOCK,), tl.float64)
    b_log_c = tl.zeros((BLOCK,), tl.float64)
    b_drift = tl.zeros((BLOCK,), tl.float64)
    b_advantage = tl.zeros((BLOCK,), tl.float64)
    for block in range(begin, end, BLOCK):
        o_row = block + tl.arange(0, BLOCK)
        trained = trained_rows(p_mask, o_row, o_row < end)
        b_length += trained.to(tl.int32)
        if V.needs_sequences:
            logp = load(p_logprob, o_row, trained)
            old = old_logprob(p_old, logp, o_row, trained)
            r = logp - old
            b_ratio += r.to(tl.float64)
            b_clamped += clamp(r, -LIMIT, LIMIT).to(tl.float64)
            behaviour = old
            if p_sampling is not None:
                behaviour = load(p_sampling, o_row, trained)
                log_c, reported = gap_to_engine(p_sampling, old, o_row, trained)
                if V.loss_type == "vespo":
                    if V.correction != "none":
                        log_c = clamp(tl.log(token_correction(log_c, reported, p_numbers, V)), LOG_MIN, LIMIT)
                        b_log_c += tl.where(trained, log_c, 0.0).to(tl.float64)
                else:
                    b_log_c += log_c.to(tl.float64)
            drift = behaviour - logp
            b_drift += tl.where(drift == drift, drift, 0.0).to(tl.float64)
            if V.per_token:
                b_advantage += load(p_advantage, o_row, trained).to(tl.float64)
    return (
        tl.sum(b_length, 0), tl.sum(b_ratio, 0), tl.sum(b_clamped, 0),
        tl.sum(b_log_c, 0), tl.sum(b_drift, 0), tl.sum(b_advantage, 0),
    )  # fmt: skip


@triton.jit
def _pooled_ratio(exponent):
    """The ratio of a sequence, and its derivative by its exponent, which is 0 outside the clamp."""
    w = tl.exp(clamp(exponent, -LIMIT, LIMIT))
    return w, tl.where(tl.abs(exponent) > LIMIT, 0.0, w)


@triton.jit
def _vespo_weight(log_w, advantage, p_numbers):
    """phi of a sequence of (mean) advantage `advantage`."""
    log_w = clamp(log_w, LOG_MIN, LIMIT)
    positive = advantage >= 0
    k = tl.where(positive, number(p_numbers, K_POS), number(p_numbers, K_NEG))
    lam = tl.where(positive, number(p_numbers, LAMBDA_POS), number(p_numbers, LAMBDA_NEG))
    return tl.exp(lam + k * log_w - lam * tl.exp(log_w))


@triton.jit
def sequence_terms(
    p_logprob, p_old, p_sampling, p_mask, p_advantage, p_numbers, begin, end, advantage, V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a whole sequence: its trained tokens (int32), the ratio w and its slope, the correction c, vespo's phi, and
    whether the off-policy mask lets it stay. What the variant does not use is not computed."""
    length, sum_ratio, sum_clamped, sum_log_c, sum_drift, sum_advantage = _sequence_sums(
        p_logprob, p_old, p_sampling, p_mask, p_advantage, p_numbers, begin, end, V, BLOCK
    )
    divisor = tl.maximum(length, 1).to(tl.float32)
    if V.per_token:
        advantage = sum_advantage.to(tl.float32) / divisor
    ratio, slope, correction, phi, stays = 1.0, 0.0, 1.0, 1.0, length >= 0
    if V.pooled:
        ratio, slope = _pooled_ratio(sum_ratio.to(tl.float32) / divisor)
    if V.corrects_sequences:
        correction = _bounded_correction(sum_log_c.to(tl.float32), p_numbers, V)
    if V.loss_type == "vespo":
        phi = _vespo_weight(sum_clamped.to(tl.float32) + sum_log_c.to(tl.float32), advantage, p_numbers)
    if V.off_policy:
        stale = (sum_drift.to(tl.float32) / divisor) > number(p_numbers, OFF_POLICY)
        stays = (stale & (advantage < 0)) == 0
    return length, ratio, slope, correction, phi, stays


@triton.jit
def token_weight(p_num_sequences, p_num_tokens, p_numbers, length, V: tl.constexpr):
    """What the term of a token counts in the loss, fp32: the aggregation table. And max(num_tokens, 1), float64."""
    sequences = tl.load(p_num_sequences).to(tl.float64)
    sequences = tl.where(sequences < 1, 1.0, sequences)
    tokens = tl.load(p_num_tokens).to(tl.float64)
    tokens = tl.where(tokens < 1, 1.0, tokens)
    if V.by_sequence:
        divisor = sequences * tl.maximum(length, 1).to(tl.float64)
    elif V.loss_type == "luspo":
        divisor = sequences
    elif V.loss_type == "dr_grpo":
        divisor = sequences * tl.load(p_numbers + MAX_LENGTH)
    else:
        divisor = tokens
    return (1.0 / divisor).to(tl.float32), tokens


@triton.jit
def policy_term(logp, w, A, phi, p_numbers, V: tl.constexpr):
    """[BLOCK] each: l, its derivative by logp directly, its derivative by the ratio."""
    zero = tl.zeros_like(logp)
    if V.clipped:
        low, high, delta = number(p_numbers, CLIP_LOW), number(p_numbers, CLIP_HIGH), number(p_numbers, DELTA)
        unclipped = tl.where(w > delta, delta, w) * A
        clipped = clamp(w, low, high) * A
        takes_unclipped = unclipped <= clipped
        open_ = tl.where(takes_unclipped, w <= delta, (w >= low) & (w <= high))
        return -tl.where(takes_unclipped, unclipped, clipped), zero, -A * open_.to(tl.float32)
    elif V.loss_type == "sapo":
        tau = tl.where(A > 0, number(p_numbers, TAU_POS), number(p_numbers, TAU_NEG))
        gate = 1.0 / (1.0 + tl.exp(-tau * (w - 1.0)))
        return -(4.0 / tau) * gate * A, zero, -4.0 * gate * (1.0 - gate) * A
    else:
        factor = zero - A
        if V.loss_type == "cispo":
            high = number(p_numbers, CLIP_HIGH)
            factor *= tl.where(w > high, high, w)
        elif V.loss_type == "vespo":
            factor *= phi
        return factor * logp, factor, zero


@triton.jit
def kl_estimate(d, V: tl.constexpr):
    """[BLOCK] each: the KL estimate from `d = ref - logp`, and its derivative by logp."""
    if V.kl_estimator == "k1":
        return -d, tl.zeros_like(d) + 1.0
    elif V.kl_estimator == "k2":
        return d * d / 2.0, -d
    else:
        e = tl.exp(clamp(d, -LIMIT, LIMIT))
        return e - d - 1.0, 1.0 - tl.where(tl.abs(d) > LIMIT, 0.0, e)


@triton.jit
def kept_rows(p_entropy, p_threshold, o_row, trained, stays):
    """Rows that keep their policy term: the off-policy mask lets the sequence stay, the entropy is high enough."""
    if p_threshold is None:
        return trained & stays
    else:
        threshold = tl.load(p_threshold).to(tl.float32)
        return trained & stays & (load(p_entropy, o_row, trained) >= threshold)


@triton.jit
def token_terms(
    p_logprob, p_entropy, p_old, p_ref, p_sampling, p_advantage, p_threshold, p_numbers, o_row, trained, advantage,
    ratio, correction, phi, stays, weight, V: tl.constexpr,
):  # fmt: skip
    """[BLOCK] each: policy and KL term of the loss, the KL estimate, dL/dlogp directly, dL/dw, w and its slope, A,
    log c, c, the tokens that the engine reported."""
    logp = load(p_logprob, o_row, trained)
    old = old_logprob(p_old, logp, o_row, trained)
    zero = tl.zeros_like(logp)
    w, slope, A, c, log_c, reported = zero + ratio, zero, zero + advantage, zero + correction, zero, trained
    if V.token_level:
        r = logp - old
        w = tl.exp(clamp(r, -LIMIT, LIMIT))
        slope = tl.where(tl.abs(r) > LIMIT, 0.0, w)
    if V.per_token:
        A = load(p_advantage, o_row, trained)
    if p_sampling is not None:
        log_c, reported = gap_to_engine(p_sampling, old, o_row, trained)
        if V.corrects_tokens:
            c = token_correction(log_c, reported, p_numbers, V)
    policy, by_logp, by_ratio = policy_term(logp, w, A, phi, p_numbers, V)
    policy_weight = tl.where(kept_rows(p_entropy, p_threshold, o_row, trained, stays), weight, 0.0)
    if V.loss_type != "vespo":
        policy_weight *= c
    policy, by_logp, by_ratio = policy_weight * policy, policy_weight * by_logp, policy_weight * by_ratio
    kl, kl_loss = zero, zero
    if p_ref is not None:
        kl, kl_slope = kl_estimate(load(p_ref, o_row, trained) - logp, V)
        if V.kl_term != "none":
            kl_weight = zero + number(p_numbers, BETA) * weight
            if V.kl_term == "bias":
                by_ratio += kl_weight * kl
                kl_weight *= w
            kl_loss = kl_weight * kl
            by_logp += kl_weight * kl_slope
    return policy, kl_loss, kl, by_logp, by_ratio, w, slope, A, log_c, c, reported
