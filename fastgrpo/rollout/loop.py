"""The plain loop: every prompt prefilled once for its whole group, then token by token with a growing cache.

It samples from the training model itself, so there is nothing to sync. Finished rows leave the batch once half of it
is idle. Not done here: a static cache, CUDA graphs, refilling from waiting prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.records import Prompt, Rollout, Sampling


class LoopEngine:
    """Generates with a transformers model in this process.

    model:      a causal (or PEFT) model; put into eval() while it generates, and back.
    tokenizer:  decodes, and names the end-of-sequence token.
    batch_size: completions decoded at once; a group larger than that still goes together.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 256) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.end_tokens = _end_tokens(model, tokenizer)

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling) -> list[Rollout]:
        """See `Engine.generate`."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(sampling.seed)
        end_tokens = torch.tensor(sorted(self.end_tokens | set(sampling.stop_token_ids)), device=device)
        # Neighbours in length share a batch: less padding. The sort is stable, so the result is repeatable.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        per_batch = max(1, self.batch_size // n)
        done: dict[int, list[Rollout]] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), per_batch):
                chunk = order[start : start + per_batch]
                tokens, logprobs = self._decode([prompts[i] for i in chunk], n, sampling, end_tokens, generator)
                for k, i in enumerate(chunk):
                    rows = slice(k * n, (k + 1) * n)
                    done[i] = self._to_rollouts(prompts[i], i, tokens[rows], logprobs[rows], end_tokens)
        finally:
            self.model.train(was_training)
        return [rollout for i in range(len(prompts)) for rollout in done[i]]

    def sync(self, policy: Any) -> None:
        """The weights are the policy's own."""

    def sleep(self) -> None:
        """Nothing is held between two calls."""

    def wake(self) -> None:
        """Nothing was given back."""

    def close(self) -> None:
        """Nothing is held."""

    @torch.no_grad()
    def _decode(
        self, prompts: list[Prompt], n: int, sampling: Sampling, end_tokens: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] int64 and their log-probs [B, L] fp32 on the CPU, -1 and NaN after the end; B = n * prompts."""
        rows = _Rows.prefill(self.model, prompts, n)
        device = rows.logits.device
        tokens = torch.full((len(prompts) * n, sampling.max_tokens), -1, device=device)
        logprobs = torch.full(tokens.shape, float("nan"), device=device)
        for step in range(sampling.max_tokens):
            token, logprob = sample(rows.logits, sampling.temperature, generator)
            tokens[rows.index, step] = token
            logprobs[rows.index, step] = logprob
            rows.live &= ~torch.isin(token, end_tokens)
            live = int(rows.live.sum())
            if live == 0 or step + 1 == sampling.max_tokens:
                break
            if live <= len(token) // 2:
                token = token[rows.live]
                rows.compact()
            rows.advance(self.model, token)
        # Rows that had ended went on being sampled until they left; cut what came after their end.
        ended = torch.isin(tokens, end_tokens)
        after = ended.cumsum(1) - ended.long() > 0
        return tokens.masked_fill(after, -1).cpu(), logprobs.masked_fill(after, float("nan")).cpu()

    def _to_rollouts(
        self, prompt: Prompt, group: int, tokens: Tensor, logprobs: Tensor, end_tokens: Tensor
    ) -> list[Rollout]:
        ends = set(end_tokens.tolist())
        lengths = (tokens >= 0).sum(1).tolist()
        ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            Rollout(prompt, group, i, logprob[: len(i)].clone(), finished=i[-1] in ends, text=text)
            for i, logprob, text in zip(ids, logprobs, texts, strict=True)
        ]


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token per row of [B, V] logits; returns tokens [B] int64 and their log-probs [B] fp32.

    An exponential race: argmax(p / e) with e ~ Exp(1) is distributed as p, without a host sync.
    """
    logprob = torch.log_softmax(logits.float() / temperature, dim=-1)
    noise = torch.empty_like(logprob).exponential_(generator=generator)
    token = (logprob.exp() / noise).argmax(dim=-1)
    return token, logprob.gather(1, token[:, None]).squeeze(1)


@dataclass
class _Rows:
    """The sequences being decoded.

    cache: keys and values; logits [B, V] of the next token; mask [B, T] or None without padding; position [B] of the
    next token; index [B] where each row's tokens are kept; live [B] bool, not ended yet.
    """

    cache: Any
    logits: Tensor
    mask: Tensor | None
    position: Tensor
    index: Tensor
    live: Tensor

    @classmethod
    def prefill(cls, model: Any, prompts: list[Prompt], n: int) -> _Rows:
        """Run the prompts once, padded on the left, and repeat the result for the group."""
        from transformers import DynamicCache

        device = next(model.parameters()).device
        lengths = torch.tensor([len(p.token_ids) for p in prompts])
        longest = int(lengths.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        padding = (longest - lengths)[:, None]
        step = torch.arange(longest)
        mask = None if not padding.any() else (step >= padding).long().to(device)
        output = model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=(step - padding).clamp(min=0).to(device),
            past_key_values=DynamicCache(config=model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        output.past_key_values.batch_repeat_interleave(n)
        return cls(
            cache=output.past_key_values,
            logits=output.logits[:, -1].repeat_interleave(n, 0),
            mask=None if mask is None else mask.repeat_interleave(n, 0),
            position=lengths.to(device).repeat_interleave(n),
            index=torch.arange(len(prompts) * n, device=device),
            live=torch.ones(len(prompts) * n, dtype=torch.bool, device=device),
        )

    def compact(self) -> None:
        """Let the rows that have ended go."""
        keep = self.live.nonzero().squeeze(1)
        self.cache.batch_select_indices(keep)
        self.mask = None if self.mask is None else self.mask[keep]
        self.position, self.index, self.live = self.position[keep], self.index[keep], self.live[keep]

    def advance(self, model: Any, token: Tensor) -> None:
        """Feed one token per row, [B], and take the logits of the next."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], 1)
        output = model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]
        self.position = self.position + 1


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The end-of-sequence tokens of the model's generation config and of the tokenizer."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
    return {i for i in ids if i is not None}
