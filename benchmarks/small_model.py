"""What the update and rollout cases work on: small Qwen3s, random weights; a tokenizer; rollouts; true gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from statistics import NormalDist
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.cases import clipped_loss, relative_error
from fastgrpo.policy.attention import register
from fastgrpo.records import Prompt, Rollout


@dataclass(frozen=True)
class Shape:
    """What sets a Qwen3's size; its LM head is its token embedding."""

    name: str
    vocabulary: int
    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SMALL = Shape("qwen3-3.1m", 4096, width=192, feed_forward=512, layers=6, heads=6, kv_heads=2, head_dim=32)
# The head holds 31 % of the parameters, as it holds 28 % of Qwen2.5-0.5B's.
MEDIUM = Shape("qwen3-10.3m", 8192, width=384, feed_forward=896, layers=5, heads=6, kv_heads=2, head_dim=64)
NAME, VOCABULARY = SMALL.name, SMALL.vocabulary


def make_model(shape: Shape = SMALL, *, packed: bool) -> Qwen3ForCausalLM:
    """In fp32, always the same weights of a shape; with this project's attention or transformers' sdpa."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 gives nearly uniform logits at this width: nothing to get wrong
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).float().eval()
    model.set_attn_implementation(register() if packed else "sdpa")
    return model


def make_tokenizer(shape: Shape = SMALL, **special: str) -> Any:
    """A word per token; by default its end of sequence is one past the vocabulary, so that every completion is full."""
    words = {str(i): i for i in range(shape.vocabulary)} | {"<eos>": shape.vocabulary}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>"} | special)


@torch.no_grad()
def make_ending(model: Any, prompts: Sequence[list[int]], *, end: int, mean: float) -> None:
    """Let completions end after each token with probability 1 / mean, by the weights alone, which every engine knows.

    The first component of the states becomes a constant that no layer writes to, hence of every logit too; the end
    token's embedding, which is the head's row too, has nothing but that component, as large as it takes on the
    prompts' tokens.
    """
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = 1.0
    embedding[end] = 0.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    hidden = torch.cat(
        [model.model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0] for ids in prompts]
    )
    logits = (hidden @ embedding.T).float()
    logits[:, end] = -inf
    wanted = logits.logsumexp(1).mean() - log(mean - 1)
    embedding[end, 0] = wanted / hidden[:, 0].float().mean()


def make_word_tokenizer(size: int) -> Any:
    """`size` words, the number of each its id, apart by spaces; but 0 pads, 1 ends a sequence, and have other names."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def lognormal_lengths(count: int, median: float, sigma: float, longest: int | None = None) -> list[int]:
    """The lognormal's quantiles, rising: no luck of the draw, and every round has the same work."""
    normal = NormalDist(log(median), sigma)
    lengths = [round(exp(normal.inv_cdf((i + 0.5) / count))) for i in range(count)]
    return lengths if longest is None else [min(length, longest) for length in lengths]


def make_rollouts(
    shape: Shape, prompts: Sequence[int], completions: Sequence[Sequence[int]], seed: int, *, on_policy: bool = True
) -> list[Rollout]:
    """A group per prompt: `prompts` and `completions` are lengths in tokens, tokens random, advantages normal.

    Off-policy, the old log-probs put the ratios on both sides of the clip range.
    """
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    made = []
    for group, (width, lengths) in enumerate(zip(prompts, completions, strict=True)):
        prompt = Prompt(group, "", torch.randint(shape.vocabulary, (width,), generator=g).tolist())
        for length in lengths:
            ids = torch.randint(shape.vocabulary, (length,), generator=g).tolist()
            old = -log(shape.vocabulary) - 0.3 + 0.3 * torch.randn(length, generator=g)
            rollout = Rollout(prompt, group, ids, old, finished=True, reward=0.0, advantage=rng.gauss(0, 1))
            rollout.old_logprob = None if on_policy else old
            made.append(rollout)
    return made


Loss = Callable[[Qwen3ForCausalLM, Tensor, Rollout], Tensor]
"""(model, states [L, D] that predict the completion's tokens, rollout) -> its part of the loss."""


def truth(shape: Shape, rollouts: Sequence[Rollout], loss: Loss) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients summed over the rollouts, each sequence alone through transformers' model in float64."""
    model = make_model(shape, packed=False).double()
    total = torch.zeros((), dtype=torch.float64)
    for r in rollouts:
        ids = torch.tensor([[*r.prompt.token_ids, *r.token_ids]])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -r.num_tokens - 1 : -1]
        part = loss(model, hidden, r)
        part.backward()
        total += part.detach()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


def dapo(model: Qwen3ForCausalLM, hidden: Tensor, rollout: Rollout) -> Tensor:
    """The clipped loss summed over the rollout's tokens: dapo's part but for the batch's number of tokens."""
    logits = model.lm_head(hidden)
    logprob = torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)
    old = logprob.detach() if rollout.old_logprob is None else rollout.old_logprob.to(logprob.dtype)
    return clipped_loss(logprob, old, torch.full_like(logprob, rollout.advantage))


def gradient_errors(model: torch.nn.Module, true_gradients: Sequence[Tensor], scale: float = 1.0) -> dict[str, float]:
    """The model's gradients against `scale` times the true ones: the worst parameter, and how many have none."""
    pairs = zip((p.grad for p in model.parameters()), true_gradients, strict=True)
    found = [None if g is None else relative_error(g, scale * true) for g, true in pairs]
    return {
        "gradient": max((e for e in found if e is not None), default=0.0),
        "missing_gradients": float(sum(e is None for e in found)),
    }
