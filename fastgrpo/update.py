"""Scored rollouts -> one optimizer step: pack, forward, loss, backward, clip, step.

Each process computes its share of the micro-batches; what they find is put together, and all take the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo import packing
from fastgrpo.advantages import assign_token_advantages
from fastgrpo.agreement import check_agreement
from fastgrpo.config import GRPOConfig
from fastgrpo.distributed import Ranks
from fastgrpo.errors import RunError
from fastgrpo.gpus import gpu_of
from fastgrpo.loss import policy_loss, value_loss
from fastgrpo.optim import Optimizer
from fastgrpo.policy import Critic, Policy, Reference
from fastgrpo.records import FOR_CRITIC, FOR_POLICY, Denominators, PackedBatch, Rollout, RolloutBatch, hand_out
from fastgrpo_kernels import LossOutput


class Updater:
    """Applies the minibatches of rollout batches to the policy and, where there is one, to the critic."""

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        optimizer: Optimizer,
        config: GRPOConfig,
        critic: Critic | None = None,
        critic_optimizer: Optimizer | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.critic = critic
        self.critic_optimizer = critic_optimizer
        self.config = config
        self.loss_config = config.loss_config()
        self._peak_flops = _peak_flops(policy.device)
        self._work = policy.work
        self._checked = False
        # Exact only when a zero advantage means a zero gradient: docs/losses.md.
        self.skip_zero = (
            config.skip_zero_advantage
            and config.beta == 0
            and config.entropy_coef == 0
            and config.top_entropy_quantile == 1
        )

    @property
    def moving_reference(self) -> Reference | None:
        """The reference, if it moves (`sync_ref_model`)."""
        return self.reference if self.config.sync_ref_model else None

    @property
    def use(self) -> dict[str, Any]:
        """What decides which of a batch's rollouts a step takes and what must be known of them."""
        names = ("num_iterations", "num_minibatches", "mask_truncated_completions")
        use: dict[str, Any] = {name: getattr(self.config, name) for name in names}
        return use | {"skip_zero_advantage": self.skip_zero, "reference": self.reference is not None}

    def notes(self) -> list[str]:
        """What a user should know of how these options and this model go together."""
        notes = []
        config = self.config
        if config.share_prompts and self.policy.unshared:
            notes.append(f"each completion gets a copy of its prompt in the update: {self.policy.unshared}")
        if config.filters:
            notes.append(
                f"{config.filters}: samples come from a narrower distribution than the one that is trained, which "
                "biases the gradient"
            )
        longest = (config.max_prompt_length or 1) + config.max_completion_length
        if longest > config.max_tokens_per_microbatch:
            notes.append(
                f"max_tokens_per_microbatch={config.max_tokens_per_microbatch} is less than a sequence may have, "
                f"{longest}: a longer one goes alone, and needs the memory of its length"
            )
        return notes

    def prepare(self, batch: RolloutBatch) -> None:
        """What must be known before the policy moves: reference log-probs, old ones where they will be needed, values.

        The first minibatch gets its old log-probs from its own first forward, at no cost; those after it do not see
        the old policy any more, so theirs are computed here. Of the first batch also whether the engine's log-probs
        are ours: EngineDisagrees if not. Advantages per token are made here, out of all this.
        """
        started = time.perf_counter()
        if self.config.check_sampling and not self._checked:
            check_agreement(self.policy, batch.rollouts, self.config)
        self._checked = True
        if self.config.per_token:
            batch.metrics |= self._judge(batch.rollouts)
        minibatches = [self._select(m) for m in packing.split_minibatches(batch.rollouts, self.config.num_minibatches)]
        if self.reference is not None:
            self._fill("ref_logprob", [r for m in minibatches for r in m], self.reference)
        self._fill("old_logprob", [r for m in minibatches[1:] for r in m], self.policy)
        batch.metrics["perf/prepare_time"] = time.perf_counter() - started

    def step(self, batch: RolloutBatch, rate: float, critic_rate: float = 0.0) -> tuple[dict[str, float], bool]:
        """One optimizer step with the batch's next minibatch; returns its metrics and whether it was applied.

        A non-finite gradient leaves the weights as they are, the policy's or the critic's, whichever has it.
        """
        started = time.perf_counter()
        minibatch = packing.split_minibatches(batch.rollouts, self.config.num_minibatches)[
            batch.used % self.config.num_minibatches
        ]
        whole = packing.denominators(minibatch, mask_truncated=self.config.mask_truncated_completions)
        chosen = self._select(minibatch)
        threshold = self._entropy_threshold(chosen)
        with self.policy.mode(training=True):
            done = [(packed, self._backward(packed, whole, threshold)) for packed in self._placed(chosen)]
        outputs = [output for _, output in done]
        loss = torch.stack([torch.zeros((), device=self.policy.device), *(o.loss.detach() for o in outputs)]).sum()
        figures, applied = self._apply(self.optimizer, rate, [*outputs, {"loss": loss.double()}], "grad_norm")
        if self.config.num_iterations > 1 and all(r.old_logprob is None for r in chosen):
            self._hand_out([(p, o.logprob) for p, o in done], chosen, "old_logprob")
        batch.used += 1
        seconds = time.perf_counter() - started
        tokens = self._token_metrics([p for p, _ in done], chosen, minibatch, seconds)
        metrics = figures | tokens | {"lr": rate}
        if self.critic is not None:
            learnt, also_applied = self._critic_step(self._trained(minibatch), whole, critic_rate)
            metrics, applied = metrics | learnt, applied and also_applied
        return metrics, applied

    def _critic_step(self, rollouts: list[Rollout], whole: Denominators, rate: float) -> tuple[dict[str, float], bool]:
        """The same for the critic; it learns from every token that trains, of dead completions too."""
        assert self.critic is not None
        assert self.critic_optimizer is not None
        started = time.perf_counter()
        parts = []
        with self.critic.body.mode(training=True):
            for packed in self._placed(rollouts, self.critic.body, FOR_CRITIC):
                values = self.critic.values(packed)
                loss, metrics = value_loss(values, packed, cliprange=self.config.cliprange_value, whole=whole)
                loss.backward()
                parts.append(metrics)
        figures, applied = self._apply(self.critic_optimizer, rate, parts, "critic/grad_norm")
        return figures | {"critic/lr": rate, "perf/critic_time": time.perf_counter() - started}, applied

    def _apply(
        self, optimizer: Optimizer, rate: float, outputs: Sequence[LossOutput | dict[str, Tensor]], norm_name: str
    ) -> tuple[dict[str, float], bool]:
        """One optimizer step with the gradients of all processes; the outputs' figures over all, and was it applied."""
        outputs = [*outputs, {norm_name: optimizer.norm().double()}]
        # The one wait of the step: until here the host runs ahead of the device.
        figures = LossOutput.reduce(outputs) if self.ranks.alone else self._everywhere(outputs, norm_name)
        return figures, optimizer.step(rate, figures[norm_name])

    def _everywhere(self, outputs: Sequence[LossOutput | dict[str, Tensor]], norm_name: str) -> dict[str, float]:
        """The figures over all processes; the norm is the same in each."""
        own = LossOutput.combine(outputs)
        values = torch.stack(list(own.values())).tolist()
        parts = self.ranks.gather("figures", dict(zip(own, values, strict=True)))
        norm = [part.pop(norm_name) for part in parts]
        sums = [{name: torch.tensor(x, dtype=torch.float64) for name, x in part.items()} for part in parts]
        return LossOutput.reduce(sums) | {norm_name: norm[0]}

    def _hand_out(self, values: list[tuple[PackedBatch, Tensor]], rollouts: list[Rollout], name: str) -> None:
        """Hand each micro-batch's [N] values back to the completions they belong to, on the CPU, in one transfer."""
        if not rollouts:
            return
        own = torch.cat([value for _, value in values]).cpu() if values else torch.zeros(0)
        members = [member for packed, _ in values for member in packed.members]
        for whose, numbers in self.ranks.gather(name, (members, own)):
            hand_out(numbers, [rollouts[member] for member in whose], name)

    def _judge(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Advantages per token of all that trains, and the returns for the critic; see docs/algorithms.md."""
        rollouts = self._trained(rollouts)
        if self.config.kl_coef and self.reference is not None:
            self._fill("ref_logprob", rollouts, self.reference)
            self._fill("old_logprob", rollouts, self.policy)
        if self.critic is not None:
            packed = self._placed(rollouts, self.critic.body, FOR_CRITIC)
            self._hand_out([(p, self.critic.predict(p)) for p in packed], rollouts, "values")
        return assign_token_advantages(rollouts, self.config, self.policy.device)

    def _trained(self, rollouts: list[Rollout]) -> list[Rollout]:
        return packing.select(rollouts, mask_truncated=self.config.mask_truncated_completions, skip_zero=False)

    def _select(self, rollouts: list[Rollout]) -> list[Rollout]:
        return packing.select(rollouts, mask_truncated=self.config.mask_truncated_completions, skip_zero=self.skip_zero)

    def _placed(
        self, rollouts: list[Rollout], model: Policy | None = None, numbers: Sequence[str] = FOR_POLICY
    ) -> Iterator[PackedBatch]:
        """This process's micro-batches for the model, by default the policy, on its device, made one at a time."""
        budget, share = self.config.max_tokens_per_microbatch, (model or self.policy).shares
        packed = packing.pack_lazily(
            rollouts,
            max_tokens=budget,
            share=share,
            work=self._work,
            numbers=numbers,
            part=(self.ranks.rank, self.ranks.size),
        )
        return self.policy.placed(packed)

    def _backward(self, packed: PackedBatch, whole: Denominators, threshold: Tensor | None) -> LossOutput:
        output = policy_loss(
            self.policy.hidden(packed),
            self.policy.head,
            packed,
            config=self.loss_config,
            temperature=self.config.temperature,
            whole=whole,
            entropy_threshold=threshold,
        )
        output.loss.backward()
        return output

    def _fill(self, name: str, rollouts: list[Rollout], model: Policy | Reference) -> None:
        """Set `old_logprob` or `ref_logprob` of the rollouts that have none yet, without gradients."""
        missing = [r for r in rollouts if getattr(r, name) is None]
        temperature = self.config.temperature
        self._hand_out([(p, model.logprobs(p, temperature)[0]) for p in self._placed(missing)], missing, name)

    def _entropy_threshold(self, rollouts: list[Rollout]) -> Tensor | None:
        """The quantile of the minibatch's entropies under the policy that starts the step; see docs/losses.md."""
        if self.config.top_entropy_quantile == 1 or not rollouts:
            return None
        temperature = self.config.temperature
        entropies = [self.policy.logprobs(packed, temperature)[1] for packed in self._placed(rollouts)]
        if not self.ranks.alone:
            own = torch.cat(entropies).cpu() if entropies else torch.zeros(0)
            entropies = [part.to(self.policy.device) for part in self.ranks.gather("entropies", own)]
        return _quantile(torch.cat(entropies).double(), 1 - self.config.top_entropy_quantile)

    def _token_metrics(
        self, packed: list[PackedBatch], chosen: list[Rollout], minibatch: list[Rollout], seconds: float
    ) -> dict[str, float]:
        """What was computed, and how fast."""
        needed, total = (sum(r.num_tokens + len(r.prompt.token_ids) for r in rs) for rs in (chosen, minibatch))
        own = [(len(p.input_ids), p.work, p.members) for p in packed]
        everywhere = [micro_batch for part in self.ranks.gather("micro-batches", own) for micro_batch in part]
        sizes, work = [size for size, _, _ in everywhere], [cost for _, cost, _ in everywhere]
        if sorted(m for *_, members in everywhere for m in members) != list(range(len(chosen))):
            raise RunError("the processes have cut the batch into different micro-batches: are their machines alike?")
        computed = sum(sizes)
        metrics = {
            "perf/update_time": seconds,
            "perf/microbatches": float(len(sizes)),
            "perf/skipped_token_fraction": 1 - needed / total if total else 0.0,
            # Against as many micro-batches of the longest one's length, and of the costliest one's work.
            "perf/packing_efficiency": computed / (len(sizes) * max(sizes)) if sizes else 1.0,
            "perf/microbatch_balance": sum(work) / (len(work) * max(work)) if work else 1.0,
            # Against every prompt once per completion.
            "perf/prompt_sharing_ratio": needed / computed if computed else 1.0,
        }
        if self._peak_flops:
            peak = self._peak_flops * self.ranks.size
            metrics["perf/mfu"] = 6 * self.policy.num_parameters * computed / seconds / peak
        return metrics


def _quantile(values: Tensor, q: float) -> Tensor:
    """`torch.quantile`, without its limit of 2^24 values and without a wait."""
    place = q * (len(values) - 1)
    low, high = math.floor(place), math.ceil(place)
    ordered = values.sort().values
    return torch.lerp(ordered[low], ordered[high], place - low)


def _peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s the device's maker states; None where it is not known, as for CPUs."""
    if device.type != "cuda":
        return None
    known = gpu_of(torch.cuda.get_device_name(device))
    return known.flops if known else None
