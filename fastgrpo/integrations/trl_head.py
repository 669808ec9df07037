"""fastgrpo's LM head inside a transformers model, behind the keyword with which TRL 1.16 asks for log-probabilities.

`model(..., labels=..., fused_lm_head=True)` runs the backbone, picks the positions whose next label is not -100, and
hands their hidden states to our ops; no other position meets the head, and logits never exist as a whole. It all
happens inside the model's forward, so that wrappers (PEFT, DistributedDataParallel, autocast) see the head being used.
Without the keyword the model's forward is what it was. Not done: sharded, quantised or non-linear heads (refused).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from fastgrpo.policy.head import describe_head
from fastgrpo_kernels import LoRADelta, LossOutput, linear_grpo_loss, linear_logprob

Score = Callable[["FusedHead", Tensor, Tensor], tuple[Tensor | None, Tensor, Tensor]]
"""(head, hidden [N, D], target [N]) -> loss (0-d or None), logprob [N], entropy [N]."""


@dataclass
class HeadOutput(ModelOutput):
    """What the model returns with `fused_lm_head=True`; the names are those TRL reads.

    loss: 0-d, or None when only log-probabilities were asked for. log_probs, entropy: [B, L-1], 0 where not scored.
    aux_loss: the 0-d load-balancing loss of a mixture of experts, when router logits were asked for.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


class FusedHead:
    """The LM head of `model` (the innermost causal model, not its PEFT wrapper) as our ops take it.

    The weights are looked up at every call, since adapters are switched and modules replaced between calls.
    cast_to_fp32: project in fp32 whatever the hidden states' dtype, outside of autocast.
    Errors: ValueError or NotImplementedError saying what about the head is not supported.
    """

    def __init__(self, model: Any, temperature: float, cast_to_fp32: bool = False) -> None:
        self._model = model
        self._cast_to_fp32 = cast_to_fp32
        described = describe_head(_WithLinearHead(model))
        self._options: dict[str, Any] = {
            "logit_scale": described.logit_scale,
            "softcap": described.softcap,
            "temperature": temperature,
        }
        _check_adapters(model.get_output_embeddings())
        self._parameters()

    def logprob(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """`linear_logprob` of hidden [N, D] and target [N]: log-probability and entropy, [N] fp32."""
        with self._precision(hidden):
            return linear_logprob(self._cast(hidden), target=target, **self._parameters(), **self._options)

    def loss(
        self, hidden: Tensor, target: Tensor, advantage: Tensor, cu_seqlens: Tensor, **arguments: Any
    ) -> LossOutput:
        """`linear_grpo_loss`, which takes the `arguments`."""
        parameters = {**self._parameters(), **self._options, **arguments}
        with self._precision(hidden):
            return linear_grpo_loss(
                self._cast(hidden), target=target, advantage=advantage, cu_seqlens=cu_seqlens, **parameters
            )

    def _cast(self, hidden: Tensor) -> Tensor:
        return hidden.float() if self._cast_to_fp32 else hidden

    def _precision(self, hidden: Tensor) -> torch.autocast:
        """The enclosing autocast, which the ops obey, or none for an fp32 head."""
        kind = hidden.device.type
        return torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not self._cast_to_fp32)

    def _parameters(self) -> dict[str, Any]:
        """weight, bias and, with an active LoRA adapter, lora, by the names of the ops' arguments."""
        head = self._model.get_output_embeddings()
        adapted = hasattr(head, "base_layer")
        linear = head.base_layer if adapted else head
        refuse_sharded(linear.weight)
        parameters = {"weight": linear.weight, "bias": linear.bias}
        if adapted:
            delta = _active_delta(head)
            if delta is not None:
                parameters["lora"] = delta
        return parameters


def install_fused_head(model: Any, temperature: float, cast_to_fp32: bool = False) -> None:
    """Give `model`, a transformers causal language model, the keywords `fused_lm_head` and `score`.

    `model(input_ids, attention_mask, ..., labels, fused_lm_head=True)` returns a HeadOutput of log-probabilities and
    entropies; with `score=` it returns what that function makes of the scored positions, in the order of the labels.
    """
    head = FusedHead(model, temperature, cast_to_fp32)
    previous = model.forward
    text_config = model.config.get_text_config()

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        score: Score | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            return previous(*args, **kwargs)
        if labels is None:
            raise ValueError("labels: expected a tensor with fused_lm_head=True, got None")
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
        next_labels = labels[:, 1:]
        scored = next_labels != -100
        rows = scored.flatten().nonzero()[:, 0]
        hidden = outputs.last_hidden_state[:, :-1].flatten(0, 1).index_select(0, rows)
        loss, logprob, entropy = (score or _logprob)(head, hidden, next_labels.flatten()[rows])
        log_probs, entropies = (
            values.new_zeros(scored.shape).masked_scatter(scored, values) for values in (logprob, entropy)
        )
        aux_loss = _load_balancing_loss(outputs, text_config, kwargs)
        return HeadOutput(loss=loss, log_probs=log_probs, entropy=entropies, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)


def refuse_sharded(weight: Tensor) -> None:
    """Raise NotImplementedError for a head that is not whole on this device."""
    if isinstance(weight, DTensor):
        raise NotImplementedError(
            "the LM head is a DTensor (FSDP2 or tensor parallelism): a sharded head is not supported; keep the head "
            "out of the sharding, or use TRL's own GRPOTrainer"
        )
    if hasattr(weight, "ds_id"):
        raise NotImplementedError(
            "the LM head is partitioned by DeepSpeed ZeRO-3: a sharded head is not supported; use ZeRO-2, or TRL's "
            "own GRPOTrainer"
        )
    if not weight.is_floating_point():
        raise NotImplementedError(
            f"the LM head's weight is {weight.dtype}: a quantised head is not supported; leave it out "
            "(llm_int8_skip_modules=['lm_head'])"
        )


def targets_head(model: Any, peft_config: Any) -> bool:
    """Would PEFT put an adapter of this config on the LM head of `model`, a loaded transformers model?"""
    from peft.tuners.tuners_utils import check_target_module_exists

    if getattr(peft_config, "target_modules", None) is None:
        return False
    head = model.get_output_embeddings()
    [name] = [name for name, module in model.named_modules() if module is head]
    return bool(check_target_module_exists(peft_config, name))


@contextmanager
def head_without_adapter(model: Any) -> Iterator[None]:
    """While this lasts, `model.get_output_embeddings()` gives the layer beneath an adapter on the head.

    TRL refuses a model whose head carries an adapter, because its own head would ignore it; ours does not.
    """
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not hasattr(head, "base_layer"):
        yield
        return
    model.get_output_embeddings = lambda: head.base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings


class _WithLinearHead:
    """A model as describe_head wants it: beneath an adapter or a trained copy of the head is the linear layer."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        head = model.get_output_embeddings()
        for inner in ("base_layer", "original_module"):
            head = getattr(head, inner, head)
        self.get_output_embeddings = lambda: head


def _logprob(head: FusedHead, hidden: Tensor, target: Tensor) -> tuple[None, Tensor, Tensor]:
    return None, *head.logprob(hidden, target)


def _load_balancing_loss(outputs: Any, text_config: Any, kwargs: dict[str, Any]) -> Tensor | None:
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(
        outputs.router_logits, text_config.num_experts, text_config.num_experts_per_tok, kwargs.get("attention_mask")
    )
    assert isinstance(loss, Tensor)
    return loss


def _check_adapters(head: Any) -> None:
    """Raise NotImplementedError unless every adapter on the head is a plain LoRA without dropout."""
    if not hasattr(head, "base_layer"):
        return
    from peft.tuners.lora import Linear

    def refuse(what: str) -> None:
        raise NotImplementedError(f"{what} on the LM head is not supported, only LoRA without dropout")

    if not isinstance(head, Linear):
        refuse(f"a {type(head).__name__} adapter")
    if getattr(head, "fan_in_fan_out", False):
        refuse("fan_in_fan_out")
    for name, up in head.lora_B.items():
        if getattr(head.lora_dropout[name], "p", 0) > 0:
            refuse("LoRA dropout (the head's inputs are shared by all tokens of a chunk, none is dropped)")
        if name in head.lora_magnitude_vector or head.lora_variant:
            refuse("DoRA or another LoRA variant")
        if up.bias is not None:
            refuse("lora_bias")


def _active_delta(head: Any) -> LoRADelta | None:
    """The LoRADelta of the active adapter of a PEFT layer; None when there is none."""
    if head.merged:
        raise NotImplementedError("the LM head's adapter is merged into its weight: unmerge it for training")
    names = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise NotImplementedError(f"several active adapters on the LM head ({', '.join(names)}) are not supported")
    [name] = names
    return LoRADelta(head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name])
