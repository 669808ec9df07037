"""A decoder's layers in few kernels, as Llama, Mistral and Qwen have them: for rollouts and for the update.

transformers runs a layer of Qwen2 as 7 products and 30 small kernels, and 59 backwards. Here residual and norm are one
kernel, so are the rotations of queries and keys with their norms, and SwiGLU; without gradients, projections of one
input are one product where their weights lie side by side. All round where transformers rounds, so that samples follow
the policy that is trained.

Which layers these are is asked, not listed: every layer's queries, keys and values and the logits are compared with the
model's own. What differs, as norms on both sides or other rotations do, runs as it always did. Not done here: adapters
in one product with what they adapt; rotations of a part of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastgrpo_kernels import add_rms_norm, rotate_heads, swiglu

# Largest difference from the model's own numbers, by norm: computed alike, they are nearly the same bits.
_ALIKE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_POSITIONS = (0, 3, 11, 29)


class Body(Protocol):
    """Logits [T, V] after a step's tokens, ids and positions [T], or after those in `keep` alone.

    step: called in every layer, as attention: module, query [1, Hq, T, d], key and value [1, Hkv, T, d] and options.
    """

    @property
    def device(self) -> torch.device: ...

    def __call__(self, step: Any, ids: Tensor, positions: Tensor, keep: Tensor | int = 0) -> Tensor: ...


class StockBody:
    """Of any model whose attention is handed to `attend=`, as it is."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __call__(self, step: Any, ids: Tensor, positions: Tensor, keep: Tensor | int = 0) -> Tensor:
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            # Four dimensions: transformers hands such a mask through and builds none. `attend` does not look at it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
            use_cache=False,
            logits_to_keep=keep,
            attend=step,
        )
        return output.logits[0]


class UnknownLayerError(ValueError):
    """A layer that is not computed as a `FusedLayer` would; one line that says how."""


class Attention:
    """Stands in for attention and writes down what every layer brings: options, and queries, keys and values."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.seen: list[Tensor] = []

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.options.append(options)
        self.seen += [query, key, value]
        grouped = query.shape[1] > key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped).transpose(1, 2)


@torch.no_grad()
def fuse(model: Any, *, joined: bool = True) -> tuple[FusedBody | None, str | None]:
    """The forward of a causal or PEFT model in few kernels, or why its layers are not such. It is in eval mode.

    joined: projections of one input are one product, whose weights get no gradients.
    """
    theirs, mine = Attention(), Attention()
    try:
        device = next(model.parameters()).device
        positions = torch.tensor(_POSITIONS, device=device)
        ids = (positions + 1) * 7919 % model.get_input_embeddings().weight.shape[0]
        theirs.seen.append(StockBody(model)(theirs, ids, positions))
        body = FusedBody(model, theirs.options, joined)
        mine.seen.append(body(mine, ids, positions))
        differences = [_difference(a, b) for a, b in zip(mine.seen, theirs.seen, strict=True)]
    except Exception as error:  # a layer of another make may fail anywhere; the stock body runs it
        return None, f"{type(error).__name__}: {error}"
    worst = max(differences)
    if not worst <= _ALIKE.get(theirs.seen[0].dtype, 0.05) or any(d != d for d in differences):
        return None, f"its layers compute something else than fused ones, by {worst:.1e} of its size"
    return body, None


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


class FusedBody:
    """Of a causal or PEFT model, of the very parameters that it has at the time.

    options: what attention is told in each layer, besides its module, queries, keys and values.
    Raises UnknownLayerError for another kind of model, where that shows; only comparing tells that it is of this one.
    """

    def __init__(self, model: Any, options: list[dict[str, Any]], joined: bool = True) -> None:
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = causal_lm.get_decoder()
        try:
            _only(decoder, {"embed_tokens", "layers", "norm"})
            self.embed, self.rotary = decoder.embed_tokens, decoder.rotary_emb
            self.norm, self.head = _norm(decoder.norm), causal_lm.lm_head
            self.layers = [
                FusedLayer.of(layer, told, joined) for layer, told in zip(decoder.layers, options, strict=True)
            ]
        except AttributeError as error:
            raise UnknownLayerError(f"{type(causal_lm).__name__}: {error}") from error

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def __call__(self, step: Any, ids: Tensor, positions: Tensor, keep: Tensor | int = 0) -> Tensor:
        x, residual = self.embed(ids), None
        rotations = self.rotary(x[None], positions[None])
        cos, sin = (r[0] for r in rotations)
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, step)
        x = self.norm(x, residual)[0]
        return self.head(x if isinstance(keep, int) else x[keep])


@dataclass(frozen=True)
class _Norm:
    """Of the sum of its inputs; also returns that."""

    module: Any
    eps: float

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, self.module.weight, eps=self.eps)


def _norm(module: Any) -> _Norm:
    _only(module, set())
    names = [name for name, _ in module.named_parameters()]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or names != ["weight"] or not isinstance(eps, float):
        raise UnknownLayerError(f"its norms are {type(module).__name__}")
    return _Norm(module, eps)


class _Products:
    """Linear maps of one input; if `joined`, one product while their weights lie side by side, without gradients."""

    def __init__(self, linears: list[Any], joined: bool) -> None:
        self.linears = linears
        self.joined = joined
        self.plain = all(type(x) is nn.Linear and not _hooked(x) for x in linears)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.plain:
            return tuple(linear(x) for linear in self.linears)
        weight, bias = self._weight() if self.joined else (None, None)
        if weight is None:
            biases = [linear.bias for linear in self.linears]
            return _SameInput.apply(x, *(linear.weight for linear in self.linears), *biases)
        return F.linear(x, weight, bias).split([linear.out_features for linear in self.linears], -1)

    def _weight(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, views; no weight where they are not to be had."""
        weights = [linear.weight for linear in self.linears]
        biases = [linear.bias for linear in self.linears if linear.bias is not None]
        bias = _joined(biases) if biases else None
        if biases and (bias is None or len(biases) < len(weights)):
            return None, None
        return _joined(weights), bias


class _SameInput(torch.autograd.Function):
    """x [T, D], weights, biases (None where there is none) -> as many outputs.

    The gradients of x are added up by the products that make them, not by passes of their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights: Any = parameters[:count]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1 : 1 + count]) else None, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, parameters[count:], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad
        gradient = None
        if need_x:
            gradient = outer[0] @ weights[0]
            for g, weight in zip(outer[1:], weights[1:], strict=True):
                gradient.addmm_(g, weight)
        of_weights = [g.T @ x if n else None for g, n in zip(outer, need[: len(outer)], strict=True)]
        of_biases = [g.sum(0) if n else None for g, n in zip(outer, need[len(outer) :], strict=True)]
        return gradient, *of_weights, *of_biases


def _joined(tensors: list[Tensor]) -> Tensor | None:
    """All of them as one, if each begins where the one before it ends."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    rows = sum(len(tensor) for tensor in tensors)
    if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() < end:
        return None  # neighbours by chance
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


@dataclass(frozen=True)
class FusedLayer:
    """attention: the module that `options` are told with; heads: norms of queries and keys, if there are any;
    rotates: are they rotated?"""

    attention: Any
    options: dict[str, Any]
    before: _Norm
    project: _Products
    size: int
    heads: tuple[_Norm, _Norm] | None
    rotates: bool
    output: Any
    after: _Norm
    mlp: Any

    @classmethod
    def of(cls, layer: Any, options: dict[str, Any], joined: bool) -> FusedLayer:
        attention = layer.self_attn
        _only(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        _only(attention, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
        names = ("q_norm", "k_norm")
        norms = [_norm(getattr(attention, name)) for name in names if getattr(attention, name, None) is not None]
        rotates = bool(getattr(attention, "use_rope", True))
        if len(norms) == 1 or len({norm.eps for norm in norms}) > 1 or (norms and not rotates):
            raise UnknownLayerError("its queries and keys are normalised otherwise")
        return cls(
            attention,
            options,
            _norm(layer.input_layernorm),
            _Products([attention.q_proj, attention.k_proj, attention.v_proj], joined),
            attention.head_dim,
            (norms[0], norms[1]) if norms else None,
            rotates,
            attention.o_proj,
            _norm(layer.post_attention_layernorm),
            _GatedMLP.of(layer.mlp, joined) or _Whole(layer.mlp),
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, step: Any
    ) -> tuple[Tensor, Tensor]:
        """What this layer adds to the residual stream, and the stream: both [T, D], from those of the layer before."""
        x, residual = self.before(x, residual)
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in self.project(x))
        if self.heads is not None:
            weights = {"q_weight": self.heads[0].module.weight, "k_weight": self.heads[1].module.weight}
            q, k = rotate_heads(q, k, cos, sin, **weights, eps=self.heads[0].eps)
        elif self.rotates:
            q, k = rotate_heads(q, k, cos, sin)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        attended = step(self.attention, q, k, v, **self.options)
        x = self.output(attended.flatten(2).squeeze(0))  # attended[0] would cost a copy back
        x, residual = self.after(x, residual)
        return self.mlp(x), residual


@dataclass(frozen=True)
class _GatedMLP:
    """SwiGLU."""

    project: _Products
    down: Any

    @classmethod
    def of(cls, mlp: Any, joined: bool) -> _GatedMLP | None:
        """None for any other kind, which runs as it is: experts, hooks."""
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        activation = getattr(mlp, "act_fn", None)
        if None in parts or _hooked(mlp) or type(activation).__name__ not in ("SiLU", "SiLUActivation"):
            return None
        return cls(_Products(parts[:2], joined), parts[2])

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down(swiglu(gate, up))


@dataclass(frozen=True)
class _Whole:
    """An MLP of another kind."""

    module: Any

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x.unsqueeze(0)).squeeze(0)


def _only(module: Any, known: set[str]) -> None:
    """A module that is not called itself: others inside it would be passed over, and so would hooks."""
    children = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    if unknown := sorted(children - known):
        raise UnknownLayerError(f"{type(module).__name__} has {', '.join(unknown)}")
    if _hooked(module):
        raise UnknownLayerError(f"{type(module).__name__} has hooks")


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
