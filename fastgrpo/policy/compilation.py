"""The decoder layers' packed forward and backward through `torch.compile`: residuals, norms, RoPE and SwiGLU fused.

Compiled is what lies around attention. Attention itself runs as it always does (attention.py asks the compiler to leave
it alone), so of all that describes a batch the compiler sees the number of tokens alone, as a symbol: no other lengths,
counts or micro-batch sizes compile anything anew. All layers of a class share what is compiled: four graphs for Llama,
Qwen and the like (first norm, projections and RoPE, output projection, the rest), once with gradients and once without;
adapters, frozen copies and gradient checkpointing add variants, however many layers there are. Beyond PyTorch's limit
of variants (8 of a function) it runs eagerly, with a warning. Ordinary forwards, generation among them, do not pass
`packed` and run as before.

Not compiled: the embedding, the last norm, the LM head. Dropout of adapters draws other numbers than without compiling.
Not bitwise: the compiler rounds otherwise than PyTorch, and may add up a weight's gradient in another order when the
first batch it meets has another size, as after a resume. Its choices by stopwatch are turned off.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastgrpo.policy.work import decoder_of


def compile_layers(causal_lm: Any, backend: str = "inductor") -> None:
    """Let the decoder's layers run packed forwards and backwards compiled, from the first one on.

    In place; parameters, their names and the modules' structure stay. Copies of the model are compiled too, and
    adapters, gradient checkpointing and `train()` may be switched before or after. A second call changes nothing.
    backend: as `torch.compile` has it.
    Raises ValueError for a model whose layers are not transformers' `GradientCheckpointingLayer`s.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in decoder_of(causal_lm).modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"torch_compile: the layers of {type(causal_lm).__name__} cannot be told from the rest of it")
    for layer in layers:
        if not hasattr(layer, "_eager_class"):
            kind: Any = type(layer)
            layer.__class__ = _compiled(kind, backend)


@functools.cache
def _compiled(eager: type[Any], backend: str) -> type[Any]:
    """A layer's class, with its packed forward compiled: one function for all layers of all models.

    A class, not a function set on the layer: transformers wraps the forward of every subclass in gradient
    checkpointing, so that this stays outside of what is compiled, and copying a layer copies it whole.
    """
    options: dict[str, Any] | None = {"deterministic": True} if backend == "inductor" else None
    compiled = torch.compile(_without_checkpointing(eager), dynamic=True, backend=backend, options=options)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (eager.forward if kwargs.get("packed") is None else compiled)(self, *args, **kwargs)

    members = {"forward": forward, "_eager_class": eager, "__module__": eager.__module__, "__doc__": eager.__doc__}
    return type(eager.__name__, (eager,), members)


def _without_checkpointing(layer: type[Any]) -> Any:
    """The forward that transformers' class wraps, where it wraps forwards: its flags would each be compiled for."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    wraps = "__init_subclass__" in vars(GradientCheckpointingLayer)  # before, it checkpointed in `__call__`
    return layer.forward.__wrapped__ if wraps else layer.forward
