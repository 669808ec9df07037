"""The policy: a causal model, its packed forward and its LM head. The reference model is one more of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.policy.attention import NAME, CannotShareError, Segments, SharedPrompts, no_mask
from fastgrpo.policy.head import describe_head
from fastgrpo.records import LMHead, PackedBatch

# Largest difference of the packed logits from the model's own, relative to the largest logit.
_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# What configs call dropout on attention weights.
_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_pdrop", "attention_probs_dropout_prob")


class Policy:
    """A causal model on one device, with its tokenizer.

    model:     a transformers causal model or a PEFT model around one.
    tokenizer: its tokenizer.
    unshared:  why a prompt is repeated for each of its completions, or None when they share it; `self_check` decides.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.is_peft = hasattr(model, "disable_adapter")
        self.causal_lm = model.get_base_model() if self.is_peft else model
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = self.causal_lm.get_input_embeddings().weight.dtype
        self.unshared: str | None = "not checked yet"

    @property
    def head(self) -> LMHead:
        """The LM head as it stands now."""
        return describe_head(self.causal_lm)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return int(self.causal_lm.get_input_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        """Longest sequence the positions were made for, or None when the config does not say."""
        return getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_parameters(self) -> int:
        """Parameters in all, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) of what trains, tied parameters once, in a fixed order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states that predict the batch's scored tokens: [N, D] of the model's dtype, differentiable."""
        segments: Segments | SharedPrompts
        if any(batch.completion_lengths):
            segments = SharedPrompts(batch.prompt_lengths, batch.completion_lengths, self.device)
        else:
            segments = Segments(batch.prompt_lengths, self.device)
        return self._states(batch.input_ids, batch.position_ids, segments).index_select(0, batch.predictor_index)

    def _states(self, input_ids: Tensor, position_ids: Tensor, segments: Segments | SharedPrompts) -> Tensor:
        """The last hidden states of all packed tokens: [T, D]."""
        output = self.causal_lm.get_decoder()(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            attention_mask=no_mask(self.device),
            use_cache=False,
            segments=segments,
        )
        return output.last_hidden_state[0]

    @property
    def shares(self) -> bool:
        """Do a prompt's completions share it in the packed forward?"""
        return self.unshared is None

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the scored tokens and the entropies there: [N] fp32 each, on the CPU, no gradient."""
        from fastgrpo_kernels import linear_logprob

        with self.mode(training=False):
            head = self.head
            logprob, entropy = linear_logprob(
                self.hidden(batch),
                head.weight,
                batch.target,
                bias=head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                temperature=temperature,
            )
        return logprob.cpu(), entropy.cpu()

    @contextmanager
    def mode(self, *, training: bool) -> Iterator[None]:
        """`train()` or `eval()` for a while. Rollouts need eval(): checkpointing drops the cache under train()."""
        before = self.model.training
        self.model.train(training)
        try:
            yield
        finally:
            self.model.train(before)

    def save(self, folder: Path) -> None:
        """Write a folder `from_pretrained` loads (a PEFT model: its adapters, which point at their base model)."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the weights `save` wrote, bit for bit. Raises ValueError when they do not fit this model."""
        if self.is_peft:
            from peft import load_peft_weights, set_peft_model_state_dict

            result: Any = set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))
            if result.unexpected_keys:
                raise ValueError(f"{folder} holds other adapters than this run's: {result.unexpected_keys[:3]}")
            return
        saved = type(self.causal_lm).from_pretrained(folder, dtype=self.dtype).state_dict()
        own = self.causal_lm.state_dict()
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (own, saved)]
        wrong = sorted(n for n in own.keys() | saved.keys() if shapes[0].get(n) != shapes[1].get(n))
        if wrong:
            raise ValueError(f"{folder} holds another model than this run's: {', '.join(wrong[:3])} differ")
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    @torch.no_grad()
    def self_check(self, *, share_prompts: bool = True, longest: int | None = None) -> None:
        """Compare packed forwards and the head's formula with the model's own logits on a few tokens.

        Decides whether completions can share their prompts (`unshared`), for sequences of up to `longest` tokens (None:
        the model's context). Raises ValueError when plain packing disagrees: the model cannot be packed, or its head
        holds more than we know of.
        """
        name = type(self.causal_lm).__name__
        ids = torch.arange(1, 15, device=self.device) * 7919 % self.vocab_size
        lengths = (5, 2, 7)
        with self.mode(training=False):
            try:
                packed = self._check_states(ids, lengths, Segments(lengths, self.device))
            except Exception as error:
                raise ValueError(f"{name} cannot run packed sequences: {type(error).__name__}: {error}") from error
            difference = self._difference(packed, self._alone(ids.split(list(lengths))))
            if not difference <= _CHECK_TOLERANCE[self.dtype]:
                raise ValueError(
                    f"{name}: packed sequences give other logits than the model's own forward (relative difference "
                    f"{difference:.1e}); its attention or LM head is of a kind that is not supported"
                )
            self.unshared = self._why_not_share(ids, longest) if share_prompts else "share_prompts is off"

    def _why_not_share(self, ids: Tensor, longest: int | None) -> str | None:
        """None when a prompt's completions can share it, exactly, in every layer."""
        config = self.causal_lm.config.get_text_config()
        if dropout := max(getattr(config, option, None) or 0.0 for option in _DROPOUTS):
            return f"attention dropout of {dropout}"
        completions, other, prompt = ids[:5].split([3, 2]), ids[5:9], ids[9:]
        limit = longest or self.context_length or sys.maxsize
        shared = SharedPrompts((5, 4), ((3, 2), ()), self.device, limit)
        row = torch.cat([prompt, other, *completions])
        try:
            packed = self._check_states(row, (5, 4, 3, 2), shared, (0, 0, 5, 5))
        except CannotShareError as error:
            return error.reason
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        first, second = (self._alone([torch.cat([prompt, c])]) for c in completions)
        expected = torch.cat([first[:5], self._alone([other]), first[5:], second[5:]])
        difference = self._difference(packed, expected)
        if not difference <= _CHECK_TOLERANCE[self.dtype]:
            return f"other logits than the model's own forward, by {difference:.1e} of the largest"
        return None

    def _check_states(
        self, ids: Tensor, lengths: tuple[int, ...], segments: Segments | SharedPrompts, starts: tuple[int, ...] = ()
    ) -> Tensor:
        """The packed forward's logits [T, V] in fp32; `starts` are the sequences' first positions, by default 0."""
        ranges = zip(starts or [0] * len(lengths), lengths, strict=True)
        positions = torch.cat([torch.arange(s, s + n, device=self.device) for s, n in ranges])
        return self.head.logits(self._states(ids, positions, segments)).float()

    def _alone(self, parts: Sequence[Tensor]) -> Tensor:
        """Logits of each sequence through the stock model, one after the other: [T, V] in fp32."""
        with attention(self.causal_lm, "eager"):
            return torch.cat([self.causal_lm(input_ids=p[None], use_cache=False).logits[0] for p in parts]).float()

    @staticmethod
    def _difference(packed: Tensor, alone: Tensor) -> float:
        return ((packed - alone).abs().max() / alone.abs().max().clamp(min=1.0)).item()


class Reference:
    """The frozen model of the KL term: a copy of the initial policy, or the policy with its adapters off."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.frozen: Policy | None = None
        if not policy.is_peft:
            self.frozen = Policy(copy.deepcopy(policy.model).requires_grad_(False), policy.tokenizer)

    def logprobs(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """As `Policy.logprobs`, under the reference."""
        if self.frozen is not None:
            return self.frozen.logprobs(batch, temperature)
        with self._policy.model.disable_adapter():
            return self._policy.logprobs(batch, temperature)

    def weights(self) -> dict[str, Tensor]:
        """The copy's parameters by name; empty when the reference is the policy with its adapters off."""
        return {} if self.frozen is None else dict(self.frozen.model.named_parameters())

    @torch.no_grad()
    def load_weights(self, saved: dict[str, Tensor]) -> None:
        """Take what `weights` gave."""
        for name, parameter in self.weights().items():
            parameter.copy_(saved[name])

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        """Move towards the policy: reference = alpha * policy + (1 - alpha) * reference (TR-DPO, arXiv 2404.09656)."""
        if self.frozen is None:
            raise ValueError("a reference made by switching adapters off cannot be moved")
        for mine, theirs in zip(self.frozen.model.parameters(), self._policy.model.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), alpha)


@contextmanager
def attention(causal_lm: Any, name: str) -> Iterator[None]:
    """Use another attention implementation for a while."""
    causal_lm.set_attn_implementation(name)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(NAME)
