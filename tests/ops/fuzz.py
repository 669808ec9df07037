"""Random whole calls of the ops, made from integers, and the rules by which what comes out of them is right.

The same integers make the same calls on any machine; neither hypothesis nor a GPU is needed. What is wanted is what
plain differentiable PyTorch finds in float64 from the same rounded inputs:

- float64: to 1e-9 of the largest magnitude; fp32: to 1e-4.
- bf16, fp16: losses, log-probs and entropies are as exact as for fp32; gradients, each over its largest magnitude,
  have together at most 1.5 times the error of plain PyTorch run in that dtype throughout.

A call in low precision whose ratio, entropy or weight lies within rounding of a branch of the loss may rightly come
out on either side: `LossCall.on_branch`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels import GroupRewards, LoRADelta, LossConfig
from fastgrpo_kernels.group_advantages.reference import group_advantages_reference
from fastgrpo_kernels.grpo_loss.config import CLIPPED, LOSS_TYPES, SAMPLING_CORRECTIONS
from fastgrpo_kernels.grpo_loss.reference import entropy_quantile, grpo_loss_reference
from fastgrpo_kernels.segments import segment_ids
from fastgrpo_kernels.token_logprob.reference import token_logprob_reference

from .oracle import Case

HALF = (torch.bfloat16, torch.float16)
MARGIN = 1e-4
"""Distance to a branch, in units of log-probs and entropies, that fp32 can be trusted to tell the side of."""


@dataclass(frozen=True)
class Bench:
    """Where calls run and how large they are. triton: kernels run them, in the interpreter or on a GPU; copies: the
    epilogue's kernel can be had there.
    """

    device: str = "cpu"
    triton: bool = False
    copies: bool = False
    lengths: tuple[int, ...] = (0, 1, 1, 2, 3, 5, 8, 13, 20)
    max_rows: int = 60
    vocab: tuple[int, ...] = (1, 2, 7, 16, 33, 64, 129, 500, 1031)
    hidden: tuple[int, ...] = (1, 3, 8, 16, 24, 33)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        low = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float16)
        return low if self.triton else (torch.float64, *low)


class Draw:
    """Random choices of one call: numbers from Python's generator, tensors from torch's on the CPU."""

    def __init__(self, seed: str, device: str) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(self._random.getrandbits(63))
        self.device = device

    def pick(self, options: Iterable[Any]) -> Any:
        return self._random.choice(list(options))

    def chance(self, p: float) -> bool:
        return self._random.random() < p

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self._generator, dtype=torch.float64)).to(self.device)

    def below(self, limit: int, size: int) -> Tensor:
        return torch.randint(0, limit, (size,), generator=self._generator).to(self.device)

    def share(self, p: float, size: int) -> Tensor:
        return (torch.rand(size, generator=self._generator) < p).to(self.device)

    def lengths(self, bench: Bench) -> list[int]:
        lengths: list[int] = []
        for _ in range(self.pick(range(8))):
            length = self.pick(bench.lengths)
            if sum(lengths) + length <= bench.max_rows:
                lengths.append(length)
        return lengths


def relative_error(got: Tensor, want: Tensor, floor: float = 1e-9) -> float:
    """Largest difference over the largest magnitude wanted, or over `floor` where that is larger; NaN is inf."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, not {list(want.shape)}"
    if want.numel() == 0:
        return 0.0
    worst = float((got.double() - want).abs().max())
    return math.inf if math.isnan(worst) else worst / max(float(want.abs().max()), floor)


def assert_near(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, floor: float = 1.0) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    error = relative_error(got.detach(), want.detach(), floor)
    assert error <= tolerance, f"{name} is off by {error:.2g} of its largest"


def rms_error(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> float:
    """Root mean square, over tensors, of their root mean square errors, each over its largest magnitude."""
    total = 0.0
    for a, b in zip(got, want, strict=True):
        if b.numel():
            limit = torch.finfo(dtype).max  # what fp16 cannot hold is rightly infinite there
            a, b = a.double().clamp(-limit, limit), b.clamp(-limit, limit)
            scale = max(float(b.abs().max()), 1e-6) if bool(b.any()) else 1.0  # absolute where nothing is wanted
            total += float((a - b).square().mean()) / scale**2
    return math.inf if math.isnan(total) else math.sqrt(total / max(len(want), 1))


def assert_gradients(
    got: list[Tensor],
    want: list[Tensor],
    usual: Callable[[torch.dtype], list[Tensor]],
    dtype: torch.dtype,
    *,
    rounded_rows: bool = False,
    at_most: float = 2**-6,
) -> None:
    """usual: the gradients that plain PyTorch finds in a dtype. rounded_rows: on the way to gradients there is one
    rounding more than in plain PyTorch, which a call of one row does not average away. at_most: error of half ones.
    """
    if dtype not in HALF:
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_near(f"gradient {i}", a, b, dtype, floor=1e-6)
        return
    ours, theirs = rms_error(got, want, dtype), rms_error(usual(dtype), want, dtype)
    allowance = 2e-6 + (torch.finfo(dtype).eps / 8 if rounded_rows else 0.0)
    assert ours <= 1.5 * theirs + allowance, f"gradients are off by {ours:.2g}, plain PyTorch's by {theirs:.2g}"
    assert ours <= at_most, f"gradients are off by {ours:.2g}"


@dataclass
class Head:
    """An LM head and the rows that meet it; tensors in the call's dtype, those of `inputs` may want a gradient."""

    inputs: dict[str, Tensor]  # hidden [N, D], weight [V, D]; bias [V], a [r, D], b [V, r] if there are
    wanted: list[str]
    target: Tensor
    form: dict[str, float | None]
    lora_scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs["hidden"].dtype

    @property
    def at_most(self) -> float:
        """Error of half gradients; LoRA's hidden states are rounded before the logits, which ratios exponentiate."""
        return math.inf if "a" in self.inputs else 2**-6

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of the inputs, those wanted with requires_grad."""
        return {
            k: x.detach().to(dtype or x.dtype, copy=True).requires_grad_(k in self.wanted)
            for k, x in self.inputs.items()
        }

    def arguments(self, leaves: dict[str, Tensor]) -> dict[str, Any]:
        lora = LoRADelta(leaves["a"], leaves["b"], self.lora_scale) if "a" in leaves else None
        return {"bias": leaves.get("bias"), "lora": lora, **self.form}

    def plain(self, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy by plain PyTorch in the leaves' dtype, logits included."""
        logits = leaves["hidden"] @ leaves["weight"].T
        if "a" in leaves:
            logits = logits + (leaves["hidden"] @ leaves["a"].T * self.lora_scale) @ leaves["b"].T
        if "bias" in leaves:
            logits = logits + leaves["bias"]
        scale, softcap, temperature = self.form["logit_scale"], self.form["softcap"], self.form["temperature"]
        assert scale is not None
        assert temperature is not None
        return plain_statistics(scale * logits, self.target, temperature, softcap)


def plain_statistics(
    logits: Tensor, target: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`token_logprob_reference`, which computes in fp32 at least, and for half logits the same in their dtype."""
    if logits.dtype not in HALF:
        return token_logprob_reference(logits, target, temperature, softcap)
    z = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    logp = torch.log_softmax(z, -1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def random_head(draw: Draw, bench: Bench, num_rows: int) -> Head:
    D, V, dtype = draw.pick(bench.hidden), draw.pick(bench.vocab), draw.pick(bench.dtypes)
    inputs = {"hidden": draw.normal(num_rows, D), "weight": draw.normal(V, D, scale=draw.pick([0.5, 2.0]) / D**0.5)}
    if draw.chance(0.4):
        inputs["bias"] = draw.normal(V)
    if draw.chance(0.3):
        rank = draw.pick([1, 3, 8])
        inputs |= {"a": draw.normal(rank, D, scale=1 / D**0.5), "b": draw.normal(V, rank, scale=0.3)}
    softcap = draw.pick([None, None, 2.0, 30.0])
    form = {"logit_scale": draw.pick([1.0, 1.0, 0.25, 1.7]), "softcap": softcap, "temperature": draw.pick([1.0, 0.7])}
    wanted = draw.pick([list(inputs)] * 3 + [["hidden"], ["weight"], [k for k in inputs if k != "weight"], []])
    return Head({k: x.to(dtype) for k, x in inputs.items()}, wanted, draw.below(V, num_rows), form, 0.5)


def random_schedule(draw: Draw, bench: Bench, head: Head, entropy_gradient: bool) -> Any:
    """One that head/plan.py allows for these inputs."""
    options = [None, None, "two_read", "recomputed"]
    if bench.triton and head.dtype == torch.bfloat16 and not entropy_gradient:
        options += ["single_read"] * 2
        if head.inputs["hidden"].shape[1] % 8 == 0 and bench.copies:
            options += ["epilogue"] * 3
    return draw.pick(options)


def random_config(draw: Draw) -> LossConfig:
    loss_type = draw.pick(LOSS_TYPES)
    corrections = SAMPLING_CORRECTIONS[:3] if loss_type == "vespo" else SAMPLING_CORRECTIONS
    return LossConfig(
        loss_type=loss_type,
        importance_sampling_level=draw.pick(["token", "sequence"]),
        epsilon=draw.pick([0.0, 0.1, 0.2]),
        epsilon_high=draw.pick([0.28, 1.3, 5.0] + [None] * (loss_type != "cispo")),
        delta=draw.pick([None, None, 0.9, 1.5, 4.0]),
        beta=draw.pick([0.0, 0.0, 0.05, 1.0]),
        kl_estimator=draw.pick(["k1", "k2", "k3"]),
        kl_bias_correction=draw.chance(0.3),
        entropy_coef=draw.pick([0.0, 0.0, 0.01, -0.5]),
        top_entropy_quantile=draw.pick([1.0, 1.0, 1.0, 0.8, 0.5, 0.33, 0.0]),
        off_policy_mask_threshold=draw.pick([None, None, 0.05, 1.0, -0.5]),
        sampling_correction=draw.pick(["none", *corrections]),
        sampling_clip_max=draw.pick([0.7, 3.0]),
        sampling_clip_min=draw.pick([None, 0.0, 0.5]),
        sapo_temperature_pos=draw.pick([1.0, 2.5]),
        vespo_k_pos=draw.pick([2.0, 0.0]),
        vespo_lambda_neg=draw.pick([2.0, 0.5]),
        max_completion_length=16,
    )


@dataclass
class LossCall:
    """case: float64, the truth (mask, advantage and denominators resolved). arguments: what the op is given."""

    case: Case
    config: LossConfig
    arguments: dict[str, Any]
    trained: Tensor  # [N] bool

    def reference(self, logprob: Tensor, entropy: Tensor | None) -> Tensor:
        """0-d, in the dtype of `logprob`."""
        advantage, keywords = self.case.advantage.to(logprob.dtype), self.case.keywords(logprob.dtype)
        return grpo_loss_reference(logprob, advantage, self.case.cu_seqlens, self.config, entropy=entropy, **keywords)

    def on_branch(self, logprob: Tensor, entropy: Tensor) -> bool:
        """Whether a choice that the loss makes turns on less than rounding in fp32; both [N] float64."""
        case, config, rows = self.case, self.config, self.trained
        S, N = case.cu_seqlens.numel() - 1, rows.numel()
        sequence = segment_ids(case.cu_seqlens, N)[rows]
        per_token = case.advantage.numel() != S
        logp, H = logprob.detach()[rows], entropy.detach()[rows]
        old = logp if case.old_logprob is None else case.old_logprob[rows]
        samp = None if case.sampling_logprob is None else case.sampling_logprob[rows]

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(S).index_add(0, sequence, x)

        length = total(torch.ones_like(logp)).clamp(min=1)
        low, high = config.clip_range
        distances = []
        if case.old_logprob is not None:  # else every ratio is exactly 1
            r = logp - old
            exponent = total(r) / length if config.importance_sampling_level == "sequence" else r
            edges = [low, high] + ([config.delta] if config.delta is not None and config.loss_type in CLIPPED else [])
            distances += [exponent - math.log(edge) for edge in edges if edge > 0] + [exponent.abs() - 20]
        if case.ref_logprob is not None:
            distances.append((case.ref_logprob[rows] - logp).abs() - 20)
        if samp is not None and config.sampling_correction.endswith("mask"):
            gap = torch.where(samp.isnan(), 0, old - samp)
            log_c = total(gap) if config.sampling_correction.startswith("sequence") else gap
            bounds = (config.sampling_clip_min or 0.0, config.sampling_clip_max)
            distances += [log_c - math.log(bound) for bound in bounds if bound > 0]
        if config.off_policy_mask_threshold is not None:
            drift = torch.nan_to_num((old if samp is None else samp) - logp, nan=0.0)
            distances.append(total(drift) / length - config.off_policy_mask_threshold)
        if per_token:
            distances.append(total(case.advantage[rows]) / length + (total(logp) == 0))
        distances += self._entropy_distances(H)
        return any(bool((x.abs() < MARGIN).any()) for x in distances)

    def _entropy_distances(self, H: Tensor) -> list[Tensor]:
        if self.case.entropy_threshold is not None:
            return [H - self.case.entropy_threshold]
        if self.config.top_entropy_quantile == 1 or H.numel() == 0:
            return []
        threshold = entropy_quantile(H, torch.ones_like(H, dtype=torch.bool), 1 - self.config.top_entropy_quantile)
        position = (1 - self.config.top_entropy_quantile) * (H.numel() - 1)
        others = H[threshold != H] if position == int(position) else H  # the threshold is then one token's own entropy
        return [others - threshold]


def random_loss_call(draw: Draw, lengths: list[int], logprob: Tensor, entropy: Tensor, dtype: torch.dtype) -> LossCall:
    """logprob, entropy: [N] float64, what the policy gives. dtype: of the call; log-probs in it or in fp32."""
    N, device = sum(lengths), draw.device
    side = draw.pick([dtype, torch.float64 if dtype == torch.float64 else torch.float32])
    spread, config = draw.pick([0.15, 0.15, 1.5, 30.0]), random_config(draw)

    def near() -> Tensor:
        return (logprob + draw.normal(N, scale=spread)).to(side)

    old, ref = (near() if draw.chance(0.7) else None), (near() if config.beta > 0 or draw.chance(0.3) else None)
    samp = near() if config.sampling_correction != "none" or draw.chance(0.5) else None
    if samp is not None:
        samp[draw.share(draw.pick([0.0, 0.3, 1.0]), N)] = math.nan
    mask = ~draw.share(draw.pick([0.3, 0.3, 1.0]), N) if draw.chance(0.5) else None
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    advantage, trained, valid = _random_advantage(draw, lengths, side, cu_seqlens)
    if mask is not None:
        trained &= mask
    num_sequences, num_tokens = draw.pick([None, 0, 7]), draw.pick([None, 0, 29])
    threshold = draw.pick([None, None, None, round(float(entropy.mean()), 2) if N else 0.5])
    truth = Case(
        logprob=logprob,
        advantage=_resolved(advantage).double(),
        cu_seqlens=cu_seqlens,
        entropy=entropy,
        old_logprob=None if old is None else old.double(),
        ref_logprob=None if ref is None else ref.double(),
        sampling_logprob=None if samp is None else samp.double(),
        mask=trained,
        entropy_threshold=threshold,
        num_sequences=valid if num_sequences is None else num_sequences,
        num_tokens=num_tokens,
    )
    for x, garbage in ((old, math.inf), (ref, -math.inf), (samp, math.inf)):
        if x is not None:
            x[~trained] = garbage
    counts: dict[str, Any] = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    if draw.chance(0.4):
        counts = {k: None if v is None else torch.tensor(v, device=device) for k, v in counts.items()}
    return LossCall(
        truth,
        config,
        {
            "advantage": advantage,
            "cu_seqlens": cu_seqlens,
            "old_logprob": old,
            "ref_logprob": ref,
            "sampling_logprob": samp,
            "mask": mask,
            "entropy_threshold": threshold,
            "config": config,
            **counts,
        },
        trained,
    )


def _random_advantage(
    draw: Draw, lengths: list[int], dtype: torch.dtype, cu_seqlens: Tensor
) -> tuple[Tensor | GroupRewards, Tensor, int]:
    """[S], [N] or rewards; the rows [N] that a failed sample does not take from training; the default denominator."""
    N, S = sum(lengths), len(lengths)
    everything = torch.ones(N, dtype=torch.bool, device=draw.device)
    kind = draw.pick(["sequence", "token", "rewards"])
    if kind != "rewards":
        advantage = draw.normal(N if kind == "token" else S).to(dtype)
        advantage[draw.share(0.15, advantage.numel())] = 0.0
        return advantage, everything, S
    values = torch.tensor([0.0, 1.0, 1.0, 0.25, -2.0], dtype=dtype, device=draw.device)
    rewards = values[draw.below(5, S)]
    rewards[draw.share(draw.pick([0.0, 0.3]), S)] = math.nan
    baseline = draw.pick(["mean", "leave_one_out", "none"])
    scale = draw.pick(["batch", "none"] + ["group"] * (baseline != "none"))
    failed = rewards.isnan()
    record = GroupRewards(rewards, draw.below(3, S) - 1, baseline, scale)
    return record, ~failed[segment_ids(cu_seqlens, N)], S - int(failed.sum())


def _resolved(advantage: Tensor | GroupRewards) -> Tensor:
    if isinstance(advantage, Tensor):
        return advantage
    return group_advantages_reference(
        advantage.rewards, advantage.group_index, advantage.baseline, advantage.scale, eps=1e-4
    )
