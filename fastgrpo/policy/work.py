"""What a model's config and weights say of its layers: how far their attention sees, and what a token costs."""

from __future__ import annotations

from typing import Any

import torch

from fastgrpo.records import Work


def decoder_of(causal_lm: Any) -> Any:
    """The layers without the LM head. Some classes name themselves when asked for it."""
    decoder = causal_lm.get_decoder()
    return decoder if decoder is not causal_lm else causal_lm.model


def layer_types(config: Any) -> list[str]:
    """Each layer's kind of attention, in transformers' words; `full_attention` where the config names none."""
    named = getattr(config, "layer_types", None)
    if named:
        return list(named)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


def layer_windows(config: Any) -> list[int | None]:
    """The tokens a query sees in each layer, itself included; None = all before it."""
    window = getattr(config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in layer_types(config)]


def describe_work(causal_lm: Any) -> Work:
    """The FLOPs of a forward pass: two per weight of a matrix and token, four per head's number and pair of attention.

    Of a mixture's experts the share that a token meets is counted. Embedding look-ups, norms and activations are not.
    """
    config = causal_lm.config.get_text_config()
    decoder = decoder_of(causal_lm)
    tables = {id(p) for m in decoder.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    met = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    weights = sum(
        p.numel() * (met if ".experts." in name else 1.0)
        for name, p in decoder.named_parameters()
        if p.ndim >= 2 and id(p) not in tables
    )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    windows = layer_windows(config)
    attention = tuple((w, 4.0 * heads * width * windows.count(w)) for w in dict.fromkeys(windows))
    return Work(2.0 * weights, 2.0 * causal_lm.get_output_embeddings().weight.numel(), attention)
