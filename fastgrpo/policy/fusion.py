"""The update's layers in few kernels: a layer's packed forward and backward through `fastgrpo.layers`.

For Llama, Mistral, Qwen and the like, of experts too; asked of every model by trying. Residuals, norms, RoPE and SwiGLU
are 5 kernels forward in place of 30, and keep neither fp32 copies for the backward nor what can be computed again from
what is kept anyway. Bitwise repeatable; the same tokens in other company are rounded alike. Ordinary forwards,
generation among them, do not pass `packed` and run as before; so do products, attention, embedding and LM head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgrpo.layers import FusedLayer, fuse
from fastgrpo.policy.attention import Packed, attend
from fastgrpo.policy.work import decoder_of
from fastgrpo_kernels import PackedLayout

# Largest difference of a layer's gradients from its own, by norm: roundings of two backwards in that dtype.
_ALIKE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def fuse_layers(model: Any) -> str | None:
    """Let a causal or PEFT model's layers run packed forwards fused, in place; or why they cannot, and nothing changes.

    Parameters, their names and the modules' structure stay. Copies of the model are fused too; `train()`, adapters and
    gradient checkpointing may be switched before or after. The model is in eval mode, on its device and in its dtype.
    """
    body, reason = fuse(model, joined=False)
    if body is None:
        return reason
    layers = list(decoder_of(_causal_lm(model)).layers)
    kinds: list[Any] = [type(layer) for layer in layers]
    for layer, fused, kind in zip(layers, body.layers, kinds, strict=True):
        layer._fused = fused
        layer.__class__ = _fused_class(kind)
    if reason := _why_not_gradients(model, layers[0]):
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
            del layer._fused
    return reason


@functools.cache
def _fused_class(eager: type[Any]) -> type[Any]:
    """A layer's class, with its packed forward fused; a class for the reasons of `compilation.py`."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packed: Packed | None = kwargs.get("packed")
        if packed is None:
            return eager.forward(self, hidden_states, *args, **kwargs)
        layer: FusedLayer = self._fused
        cos, sin = (table.squeeze(0) for table in kwargs["position_embeddings"])
        x, residual = layer(hidden_states.squeeze(0), None, cos, sin, attend(packed))
        return (residual + x).unsqueeze(0)

    members = {"forward": forward, "_eager_class": eager, "__module__": eager.__module__, "__doc__": eager.__doc__}
    return type(eager.__name__, (eager,), members)


def _why_not_gradients(model: Any, layer: Any) -> str | None:
    try:
        difference = _gradients_differ(model, layer)
    except Exception as error:  # what a kernel does on a machine that it was not made for
        return f"{type(error).__name__}: {error}"
    if difference <= _ALIKE[layer._fused.before.module.weight.dtype]:
        return None
    return f"its layers' gradients differ from fused ones by {difference:.1e} of their size"


def _gradients_differ(model: Any, layer: Any) -> float:
    """Of a layer's input and vectors, by its own forward and by the fused one, on a few packed tokens."""
    decoder = decoder_of(_causal_lm(model))
    weight = layer._fused.before.module.weight
    layout = PackedLayout((5, 3), ((), ()), weight.device)
    generator = torch.Generator().manual_seed(0)
    x, outer = (torch.randn(1, 8, len(weight), generator=generator).to(weight) for _ in range(2))
    x.requires_grad_()
    options = {"position_embeddings": decoder.rotary_emb(x, layout.position_ids[None]), "attention_mask": None}
    inputs = [x, *(p for p in layer.parameters() if p.ndim == 1 and p.requires_grad)]
    found = []
    with torch.enable_grad():
        for kind in (layer._eager_class, type(layer)):
            out = kind.forward(layer, x, packed=Packed(layout), **options)
            gradients = torch.autograd.grad(out, inputs, outer, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([gradient.double().flatten() for gradient in gradients]))
    return ((found[0] - found[1]).norm() / found[0].norm()).item()


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
