"""A decoder's layers in few kernels, as Llama, Mistral and Qwen have them: for rollouts and for the update.

transformers runs a layer of Qwen2 as 7 products and 30 small kernels, and 59 backwards. Here residual and norm are one
kernel, so are the rotations of queries and keys with their norms, and SwiGLU; without gradients, projections of one
input are one product where their weights lie side by side. All round where transformers rounds, so that samples follow
the policy that is trained.

Which layers these are is asked, not listed: every layer's queries, keys and values, what it adds, and the logits are
compared with the model's own. What differs, as norms on both sides or other rotations do, runs as it always did. Not
done here: adapters in one product with what they adapt; rotations of a part of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.products import Products, hooked
from fastgrpo_kernels import add_rms_norm, rotate_heads, swiglu

# Largest difference from a layer's own numbers, by norm: computed alike, they are nearly the same bits.
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
    theirs = Attention()
    try:
        device = next(model.parameters()).device
        positions = torch.tensor(_POSITIONS, device=device)
        ids = (positions + 1) * 7919 % model.get_input_embeddings().weight.shape[0]
        with _streams(model) as streams:
            logits = StockBody(model)(theirs, ids, positions)
        body = FusedBody(model, theirs.options, joined)
        differences = _differences(body, ids, positions, streams, theirs.seen, logits)
    except Exception as error:  # a layer of another make may fail anywhere; the stock body runs it
        return None, f"{type(error).__name__}: {error}"
    worst = max(differences)
    if not worst <= _ALIKE.get(theirs.seen[0].dtype, 0.05) or any(d != d for d in differences):
        return None, f"its layers compute something else than fused ones, by {worst:.1e} of its size"
    return body, None


@contextmanager
def _streams(model: Any) -> Iterator[list[Tensor]]:
    """What comes into every layer and into the last norm, [T, D], of a forward in here."""
    decoder, found = causal_lm_of(model).get_decoder(), list[Tensor]()
    modules = (*decoder.layers, decoder.norm)
    hooks = [m.register_forward_pre_hook(lambda _, given: found.append(given[0].squeeze(0))) for m in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _differences(
    body: FusedBody, ids: Tensor, positions: Tensor, streams: list[Tensor], attended: list[Tensor], logits: Tensor
) -> list[float]:
    """Of every layer from its own numbers, each from the model's own input.

    From layer to layer roundings would grow, in a deep model beyond what tells one kind of layer from another.
    """
    mine = Attention()
    found = [_difference(body.embed(ids), streams[0])]
    rotations = body.rotations(streams[0], positions)
    for layer, (x, after) in zip(body.layers, pairwise(streams), strict=True):
        added, stream = layer(x, None, *rotations, mine)
        # A token near the border between two experts may go to the other one, by rounding.
        found.append(_difference(stream + added, after, x, most=isinstance(layer.mlp, Whole)))
    found += [_difference(a, b) for a, b in zip(mine.seen, attended, strict=True)]
    return [*found, _difference(body.logits(streams[-1], None), logits)]


def _difference(a: Tensor, b: Tensor, before: Tensor | None = None, *, most: bool = False) -> float:
    """Of a from b, over b; or over what b adds to `before`, less what rounding takes. most: of half the tokens."""
    distance, size = a.double() - b.double(), b.double()
    added = size if before is None else size - before.double()
    distance, size, added = (x.norm(dim=-1) if most else x.norm() for x in (distance, size, added))
    if before is not None:
        distance = (distance - torch.finfo(a.dtype).eps * size).clamp(min=0)
    return (distance / added.clamp(min=1e-30)).median().item()


def causal_lm_of(model: Any) -> Any:
    """The causal model in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class FusedBody:
    """Of a causal or PEFT model, of the very parameters that it has at the time.

    options: what attention is told in each layer, besides its module, queries, keys and values.
    Raises UnknownLayerError for another kind of model, where that shows; only comparing tells that it is of this one.
    """

    def __init__(self, model: Any, options: list[dict[str, Any]], joined: bool = True) -> None:
        self.causal_lm = causal_lm_of(model)
        self.decoder = self.causal_lm.get_decoder()
        try:
            if hooked(self.causal_lm):
                raise UnknownLayerError(f"{type(self.causal_lm).__name__} has hooks")
            _only(self.decoder, {"embed_tokens", "layers", "norm"})
            self.norm = _norm(self.decoder.norm)
            self.layers = [FusedLayer.of(*of, joined) for of in zip(self.decoder.layers, options, strict=True)]
        except AttributeError as error:
            raise UnknownLayerError(f"{type(self.causal_lm).__name__}: {error}") from error

    @property
    def device(self) -> torch.device:
        return self.norm.module.weight.device

    def __call__(self, step: Any, ids: Tensor, positions: Tensor, keep: Tensor | int = 0) -> Tensor:
        x, residual = self.embed(ids), None
        cos, sin = self.rotations(x, positions)
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, step)
        return self.logits(x, residual, keep)

    def embed(self, ids: Tensor) -> Tensor:
        """[T, D]"""
        return self.decoder.embed_tokens(ids)

    def rotations(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, d] in the dtype of x."""
        cos, sin = self.decoder.rotary_emb(x[None], positions[None])
        return cos[0], sin[0]

    def logits(self, x: Tensor, residual: Tensor | None, keep: Tensor | int = 0) -> Tensor:
        """From what the last layer gives."""
        x = self.norm(x, residual)[0]
        return self.causal_lm.lm_head(x if isinstance(keep, int) else x[keep])


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


@dataclass(frozen=True)
class FusedLayer:
    """attention: the module that `options` are told with; heads: norms of queries and keys, if there are any;
    rotates: are they rotated?"""

    attention: Any
    options: dict[str, Any]
    before: _Norm
    project: Products
    size: int
    heads: tuple[_Norm, _Norm] | None
    rotates: bool
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
            Products(attention, ("q_proj", "k_proj", "v_proj"), joined),
            attention.head_dim,
            (norms[0], norms[1]) if norms else None,
            rotates,
            _norm(layer.post_attention_layernorm),
            _GatedMLP.of(layer.mlp, joined) or Whole(layer.mlp),
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, step: Any
    ) -> tuple[Tensor, Tensor]:
        """What this layer adds to the residual stream, and the stream: both [T, D], from those of the layer before."""
        x, residual = self.before(x, residual)
        x, residual = self.after(self._attended(x, cos, sin, step), residual)
        return self.mlp(x), residual

    def _attended(self, x: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
        """By itself, so that queries, keys and values are gone when it is done."""
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in self.project(x))
        if self.heads is not None:
            weights = {"q_weight": self.heads[0].module.weight, "k_weight": self.heads[1].module.weight}
            q, k = rotate_heads(q, k, cos, sin, **weights, eps=self.heads[0].eps)
        elif self.rotates:
            q, k = rotate_heads(q, k, cos, sin)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        attended = step(self.attention, q, k, v, **self.options)
        return self.attention.o_proj(attended.flatten(2).squeeze(0))  # attended[0] would cost a copy back

    @property
    def passes_over_hooks(self) -> bool:
        """Has a module that is not called here got hooks since?"""
        norms = (self.before, self.after, *(self.heads or ()))
        return any(map(hooked, (self.attention, *(norm.module for norm in norms), *self.mlp.passed_over)))


@dataclass(frozen=True)
class _GatedMLP:
    """SwiGLU. passed_over: modules that are not called."""

    module: Any
    passed_over: tuple[Any, ...]
    project: Products

    @classmethod
    def of(cls, mlp: Any, joined: bool) -> _GatedMLP | None:
        """None for any other kind, which runs as it is: experts, hooks."""
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        activation = getattr(mlp, "act_fn", None)
        if None in parts or type(activation).__name__ not in ("SiLU", "SiLUActivation"):
            return None
        if any(map(hooked, (mlp, activation))):
            return None
        return cls(mlp, (mlp, activation), Products(mlp, ("gate_proj", "up_proj"), joined))

    def __call__(self, x: Tensor) -> Tensor:
        return self.module.down_proj(swiglu(*self.project(x)))


@dataclass(frozen=True)
class Whole:
    """An MLP of another kind."""

    module: Any
    passed_over: tuple[Any, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x.unsqueeze(0)).squeeze(0)


def _only(module: Any, known: set[str]) -> None:
    """A module that is not called itself: others inside it would be passed over, and so would hooks."""
    children = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    if unknown := sorted(children - known):
        raise UnknownLayerError(f"{type(module).__name__} has {', '.join(unknown)}")
    if hooked(module):
        raise UnknownLayerError(f"{type(module).__name__} has hooks")
