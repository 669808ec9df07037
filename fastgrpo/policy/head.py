"""The LM head of any causal model, as the four numbers and tensors a fused loss needs."""

from __future__ import annotations

from typing import Any

import torch

from fastgrpo.records import LMHead


def describe_head(model: Any) -> LMHead:
    """Read scale and cap from the model's config.

    The names differ by family, so the caller compares the result with the model's own logits before relying on it.
    Raises ValueError when the head is not one linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        kind = "missing" if head is None else f"of type {type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"the LM head of {type(model).__name__} is {kind}, not one plain torch.nn.Linear")
    config = model.config.get_text_config()

    def option(*names: str) -> float | None:
        values = (getattr(config, name, None) for name in names)
        return next((float(v) for v in values if v is not None), None)

    scale = option("logit_scale", "lm_head_multiplier", "output_multiplier") or 1.0
    scaling = option("logits_scaling")
    if scaling:
        # Granite divides by it; HyperCLOVA X multiplies.
        scale = scale * scaling if "hyperclova" in config.model_type else scale / scaling
    softcap = option("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return LMHead(head.weight, getattr(head, "bias", None), scale, softcap or None)
