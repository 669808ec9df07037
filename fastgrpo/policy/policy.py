"""The policy: a causal model, its packed forward and its LM head. The reference model is one more of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.policy.attention import Packed, no_mask
from fastgrpo.policy.head import describe_head
from fastgrpo.policy.self_check import self_check
from fastgrpo.policy.work import decoder_of, describe_work
from fastgrpo.records import LMHead, PackedBatch, Work


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
        self._copies: torch.cuda.Stream | None = None  # one for good: the allocator keeps memory for each stream

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

    @property
    def work(self) -> Work:
        """The FLOPs of a forward pass."""
        return describe_work(self.causal_lm)

    def placed(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """The batches on this device. Each is made and copied to a GPU while it still computes the one before."""
        if self.device.type != "cuda":
            yield from batches
            return
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        copies, compute = self._copies, torch.cuda.current_stream(self.device)
        for batch in batches:
            with torch.cuda.stream(copies):
                moved = batch.to(self.device)
            compute.wait_stream(copies)
            for tensor in moved.tensors():
                tensor.record_stream(compute)
            yield moved

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states that predict the batch's scored tokens: [N, D] of the model's dtype, differentiable.

        Raises ValueError when the batch's layout does not add up to its tokens.
        """
        if len(batch.input_ids) != batch.layout.num_tokens:
            raise ValueError(f"{len(batch.input_ids)} input_ids, but the layout has {batch.layout.num_tokens} tokens")
        states = self.states(batch.input_ids, Packed(batch.layout))
        # A shared prompt's last row is taken once per completion. Each device has one of the two whose backward adds
        # the gradients up in a fixed order; the other one uses atomics there.
        return states[batch.predictor_index] if states.is_cuda else states.index_select(0, batch.predictor_index)

    def states(self, input_ids: Tensor, packed: Packed) -> Tensor:
        """The last hidden states of all packed tokens, those of prompts too: [T, D]."""
        output = decoder_of(self.causal_lm)(
            input_ids=input_ids.unsqueeze(0),
            position_ids=packed.layout.position_ids.unsqueeze(0),
            attention_mask=no_mask(self.device),
            use_cache=False,
            packed=packed,
        )
        return output.last_hidden_state[0]

    @property
    def shares(self) -> bool:
        """Do a prompt's completions share it in the packed forward?"""
        return self.unshared is None

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the scored tokens and the entropies there: [N] fp32 each, on the device, no gradient."""
        from fastgrpo_kernels import linear_logprob

        with self.mode(training=False):
            head = self.head
            return linear_logprob(
                self.hidden(batch),
                head.weight,
                batch.target,
                bias=head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                temperature=temperature,
            )

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
        if self.is_peft:
            self.model.save_pretrained(folder)
        else:
            # What lies in one storage, most of the model, transformers would copy on the device: here in host memory.
            self.model.save_pretrained(folder, state_dict={n: _apart(t) for n, t in self.model.state_dict().items()})
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the weights `save` wrote, bit for bit. Raises ValueError when they do not fit this model."""
        if self.is_peft:
            from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

            if not (folder / "adapter_config.json").is_file():
                raise ValueError(f"{folder} holds a whole model, this run trains adapters (use_peft)")
            weights = load_peft_weights(str(folder), device="cpu")
            mine = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            if wrong := [n for n in weights.keys() & mine.keys() if weights[n].shape != mine[n].shape]:
                name = min(wrong)
                raise ValueError(
                    f"{folder} holds adapters of other shapes than this run's: {name} is "
                    f"{list(weights[name].shape)} there, {list(mine[name].shape)} here"
                )
            result: Any = set_peft_model_state_dict(self.model, weights)
            if result.unexpected_keys:
                raise ValueError(f"{folder} holds other adapters than this run's: {result.unexpected_keys[:3]}")
            return
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} holds adapters (use_peft), this run trains the whole model")
        saved = type(self.causal_lm).from_pretrained(folder, dtype=self.dtype).state_dict()
        own = self.causal_lm.state_dict()
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (own, saved)]
        wrong = sorted(n for n in own.keys() | saved.keys() if shapes[0].get(n) != shapes[1].get(n))
        if wrong:
            raise ValueError(f"{folder} holds another model than this run's: {', '.join(wrong[:3])} differ")
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def self_check(self, *, share_prompts: bool = True, longest: int | None = None) -> None:
        """Compare packed forwards and the head's formula with the model's own logits on a few tokens.

        Decides whether completions can share their prompts (`unshared`), for sequences of up to `longest` tokens (None:
        the model's context). Raises ValueError when plain packing disagrees: the model cannot be packed, or its head
        holds more than we know of.
        """
        self.unshared = self_check(self, share_prompts=share_prompts, longest=longest)


def _apart(tensor: Tensor) -> Tensor:
    """The tensor, or a copy in host memory if it lies beside others."""
    beside = type(tensor) is Tensor and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.to("cpu", copy=True) if beside else tensor


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
