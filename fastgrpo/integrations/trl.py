"""`FusedGRPOTrainer`: TRL 1.16's GRPOTrainer with fastgrpo's LM head and loss in place of its own.

Everything else is TRL's: data, generation, rewards, advantages, optimisation, logging, checkpoints. Loss values and
gradients are TRL's for every loss type and option, normalisation included. What changes: half-precision products keep
their fp32 logits; the LM head costs 3 products where TRL's costs 4 (2 for 3 when frozen); tokens that do not train
never meet it in the loss; LoRA on it trains; log-ratios are clamped to +-20 before they are exponentiated.
A `top_entropy_quantile` < 1 together with an entropy bonus or several processes costs a fourth product.

Not done: sharded heads (FSDP, ZeRO-3, tensor parallelism), advantages per token, liger kernels: refused. Inputs of
vision-language models are handed to the model as TRL does, but only text is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from fastgrpo_kernels import LossConfig, grpo_loss

if not version("trl").startswith("1.16."):
    raise ImportError(
        f"fastgrpo.integrations.trl replaces private methods of TRL and works with 1.16 only, found {version('trl')}: "
        "pip install 'trl==1.16.*'"
    )

from trl import GRPOConfig, GRPOTrainer

from .trl_head import FusedHead, head_without_adapter, install_fused_head, targets_head
from .trl_metrics import global_means, policy_metrics

_PASSED_ON = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
)
"""Inputs, beside tokens and attention mask, that TRL hands to a vision-language model."""

_PER_TOKEN = ("cispo", "dapo", "vespo")
"""Loss types that TRL divides by the number of tokens of a whole generation batch."""


@dataclass(frozen=True)
class _Batch:
    """The padded tensors of one micro-batch, and the N tokens that train, packed.

    mask: [B, C] bool. rows: [N] int64 into the flattened [B, C]. cu_seqlens: [B+1] int32. advantage: [B].
    old, ref, sampling: [B, C] log-probabilities or None.
    """

    mask: Tensor
    rows: Tensor
    cu_seqlens: Tensor
    advantage: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampling: Tensor | None

    @staticmethod
    def of(inputs: dict[str, Any]) -> _Batch:
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        advantage = inputs["advantages"]
        if advantage.numel() != mask.shape[0]:
            raise ValueError(f"advantages: expected one per completion, [{mask.shape[0]}], got {list(advantage.shape)}")
        logprobs = (inputs.get(f"{name}_per_token_logps") for name in ("old", "ref", "sampling"))
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        return _Batch(mask, mask.flatten().nonzero()[:, 0], cu_seqlens, advantage.flatten(), *logprobs)

    def loss_arguments(self) -> dict[str, Tensor | None]:
        """The packed log-probabilities by the names of the ops' arguments."""
        named = {"old_logprob": self.old, "ref_logprob": self.ref, "sampling_logprob": self.sampling}
        return {name: None if x is None else x.flatten()[self.rows] for name, x in named.items()}


class FusedGRPOTrainer(GRPOTrainer):
    """A GRPOTrainer; see its documentation for the arguments, of which only the first four may be positional.

    LoRA on the LM head (`target_modules=["lm_head", ...]`) needs a loaded model or a PeftModel, and no dropout there.
    Errors: ValueError or NotImplementedError naming what is not supported, when the trainer is made.
    """

    args: GRPOConfig
    model: Any
    _entropy_window_stats: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        _refuse(model, args, peft_config)
        if peft_config is not None and not isinstance(model, str) and targets_head(model, peft_config):
            from peft import get_peft_model

            # Where TRL would have made the adapter, and from the same seed.
            set_seed(42 if args is None else args.seed)
            model, peft_config = get_peft_model(model, peft_config), None
        with head_without_adapter(model):
            super().__init__(model, reward_funcs, args, train_dataset, peft_config=peft_config, **others)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise NotImplementedError(
                "FSDP and DeepSpeed ZeRO-3 shard the LM head, which is not supported; use DDP or ZeRO-2, or TRL's own "
                "GRPOTrainer"
            )
        for patched in (self.model, self.ref_model):
            if patched is not None:
                inner = self.accelerator.unwrap_model(patched)
                inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
                install_fused_head(inner, self.temperature, self.args.cast_lm_head_to_fp32)
        self._loss_config = _loss_config(self)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch = _Batch.of(inputs)
        mode = "train" if self.model.training else "eval"
        accumulation = self._accumulation(mode)
        scale: float | Tensor = 1 / accumulation
        if self.loss_type in _PER_TOKEN:
            scale = max(batch.rows.numel(), 1) / self._num_tokens(inputs, mode)

        def score(head: FusedHead, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self._policy_loss(head, hidden, target, batch, mode, scale)

        with self.accelerator.autocast():
            output = model(**self._model_inputs(inputs, batch), fused_lm_head=True, score=score)
        loss = output.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef / accumulation * output.aux_loss
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(output.aux_loss).mean().item())
        length = batch.mask.shape[1]
        self._log_policy(mode, batch, output.log_probs[:, -length:], output.entropy[:, -length:], inputs)
        return loss

    def _num_tokens(self, inputs: dict[str, Any], mode: str) -> Tensor:
        """0-d: this process's share of the trained tokens of one optimizer step, as TRL counts them."""
        share = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            share = share * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return share

    def _model_inputs(self, inputs: dict[str, Any], batch: _Batch) -> dict[str, Any]:
        """The model's inputs, with -100 as the label of all that does not train."""
        given = {name: inputs[name] for name in _PASSED_ON if inputs.get(name) is not None}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        return {
            **given,
            "input_ids": torch.cat([prompt, completion], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            "labels": torch.cat([torch.full_like(prompt, -100), completion.masked_fill(~batch.mask, -100)], dim=1),
        }

    def _policy_loss(
        self, head: FusedHead, hidden: Tensor, target: Tensor, batch: _Batch, mode: str, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log-probabilities and entropies [N] of the packed tokens.

        scale: what the loss with this micro-batch's own denominators is multiplied by. The bonus is TRL's: the mean
        entropy of this micro-batch divided by the accumulation steps, whatever divides the policy's term.
        """
        accumulation = self._accumulation(mode)
        bonus = self._entropy_coef() / accumulation if self._entropy_bonus_enabled else 0.0
        top_only = self._loss_config.top_entropy_quantile < 1
        if top_only and (self._entropy_bonus_enabled or self.accelerator.num_processes > 1):
            logprob, entropy = head.logprob(hidden, target)
            kept = self._top_entropy(entropy.detach())
            policy = self._policy_of_kept(logprob, entropy.detach(), kept, batch) * scale
            loss = policy - bonus * torch.where(kept, entropy, 0).sum() / kept.sum().clamp(min=1)
            logprob, entropy = logprob.detach(), entropy.detach()
        else:
            # One number must be known on the host, and only where TRL divides its bonus and policy term differently.
            config = replace(self._loss_config, entropy_coef=bonus / float(scale) if bonus else 0.0)
            part = head.loss(hidden, target, batch.advantage, batch.cu_seqlens, config=config, **batch.loss_arguments())
            assert part.entropy is not None
            logprob, entropy, loss = part.logprob, part.entropy, part.loss * scale
            kept = torch.ones_like(target, dtype=torch.bool)
            policy = loss.detach() + bonus * entropy.sum() / max(entropy.numel(), 1)
        if self._entropy_bonus_enabled:
            if self.loss_type not in _PER_TOKEN:
                policy = policy * accumulation
            self._log_bonus(mode, policy.detach(), torch.where(kept, entropy, 0).sum(), kept.sum())
        return loss, logprob, entropy

    def _accumulation(self, mode: str) -> int:
        return self.current_gradient_accumulation_steps if mode == "train" else 1

    def _top_entropy(self, entropy: Tensor) -> Tensor:
        """[N] bool: tokens at or above the quantile of all processes' tokens."""
        everything = torch.ones_like(entropy)
        return self.get_high_entropy_mask(entropy, everything, 1 - self._loss_config.top_entropy_quantile)

    def _policy_of_kept(self, logprob: Tensor, entropy: Tensor, kept: Tensor, batch: _Batch) -> Tensor:
        """The loss when the entropies must be known, over all processes, before it."""
        lowest_kept = torch.cat([torch.where(kept, entropy, torch.inf), entropy.new_full((1,), torch.inf)]).amin()
        output = grpo_loss(
            logprob,
            batch.advantage,
            batch.cu_seqlens,
            entropy=entropy,
            entropy_threshold=lowest_kept,
            config=self._loss_config,
            **batch.loss_arguments(),
        )
        return output.loss

    def _entropy_coef(self) -> float:
        """The coefficient of this step; in adaptive mode none while the last step's entropy was above the target."""
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return float(self.entropy_coef)

    def _log_bonus(self, mode: str, policy_loss: Tensor, entropy_sum: Tensor, num_tokens: Tensor) -> None:
        """Metrics of an entropy bonus; at the end of an optimizer step, the adaptive coefficient's next value."""
        self._metrics[mode]["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
        if mode != "train":
            return
        step_ends = self.accelerator.sync_gradients
        if self.use_adaptive_entropy:
            window = torch.stack([entropy_sum.float(), num_tokens.float()])
            if self._entropy_window_stats is not None:
                window = window + self._entropy_window_stats
            self._entropy_window_stats = None if step_ends else window
            if step_ends:
                total, count = self.accelerator.reduce(window, reduction="sum").tolist()
                self._last_world_entropy = total / max(count, 1.0)
                too_low = self._last_world_entropy <= self.args.entropy_target
                moved = self.entropy_coef + (1 if too_low else -1) * self.args.entropy_coef_delta
                self.entropy_coef = min(max(moved, self.args.entropy_coef_min), self.args.entropy_coef_max)
        if step_ends:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)

    @torch.no_grad()
    def _log_policy(self, mode: str, batch: _Batch, logprob: Tensor, entropy: Tensor, inputs: dict[str, Any]) -> None:
        """TRL's metrics of the policy under TRL's names."""
        metrics = policy_metrics(
            self.accelerator, self._loss_config, batch.mask, batch.advantage, logprob, entropy, batch.old, batch.ref
        )
        if self.loss_type == "vespo":
            log_ratio = torch.zeros_like(logprob) if batch.old is None else logprob - batch.old
            phi = self.get_gamma_weights(
                advantages=batch.advantage.unsqueeze(1),
                log_ratio_per_token=torch.where(batch.mask, log_ratio, 0),
                mask=batch.mask,
                importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
                k_pos=self.args.vespo_k_pos,
                lambda_pos=self.args.vespo_lambda_pos,
                k_neg=self.args.vespo_k_neg,
                lambda_neg=self.args.vespo_lambda_neg,
            )
            metrics |= global_means(self.accelerator, {"vespo/phi_seq_mean": phi}, batch.mask)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)


def _refuse(model: Any, args: GRPOConfig | None, peft_config: Any) -> None:
    if args is not None and args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel: expected False with FusedGRPOTrainer, whose own head and loss take that place, got True"
        )
    targets = getattr(peft_config, "target_modules", None) or ()
    if isinstance(model, str) and "lm_head" in targets:
        raise ValueError(
            f"model: expected a loaded model or a PeftModel for an adapter on the LM head, got the name {model!r}"
        )


def _loss_config(trainer: Any) -> LossConfig:
    """The trainer's options as a LossConfig, without the entropy bonus, whose denominator is its own."""
    args = trainer.args
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    clip_max = trainer.vllm_importance_sampling_clip_max
    return LossConfig(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        epsilon=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta,
        beta=trainer.beta,
        kl_bias_correction=args.use_bias_correction_kl,
        top_entropy_quantile=trainer.top_entropy_quantile,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        sampling_correction=trainer.vllm_importance_sampling_mode if corrected else "none",
        sampling_clip_max=torch.finfo(torch.float32).max if clip_max is None else clip_max,
        sampling_clip_min=trainer.vllm_importance_sampling_clip_min,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=max(args.vespo_lambda_pos, 1e-4),
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=max(args.vespo_lambda_neg, 1e-4),
        max_completion_length=trainer.max_completion_length,
    )
