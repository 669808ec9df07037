"""What crosses the borders between the stages of a step, and nothing else.

    Prompt --rollout--> Rollout --rewards--> scored Rollout --advantages--> --packing--> PackedBatch --policy--> hidden

Stages never import one another; they meet here. Only torch and the standard library are imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastgrpo_kernels import PackedLayout

Message = dict[str, Any]
"""One chat message: `{"role": ..., "content": ...}`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the data set, ready to be sampled from.

    index:     the row's number in the data set, after filtering; stable from run to run.
    content:   what the user wrote, a string or chat messages; the rewards see this.
    token_ids: the tokens the model sees, chat template applied; never empty.
    columns:   all other columns of the row, passed to the rewards by keyword.
    """

    index: int
    content: str | list[Message]
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)


def digest(prompts: list[Prompt]) -> str:
    """Of their tokens, in their order: the same in every process for the same prompts."""
    return f"{hash(tuple(tuple(p.token_ids) for p in prompts)) % 2**64:016x}"  # of integers: no secret in it


@dataclass(slots=True)
class Rollout:
    """One sampled completion. The engine fills the first part; rewards and advantages the second.

    group:             which prompt of the rollout batch it answers; the unit of normalisation.
    token_ids:         the L sampled tokens, the end-of-sequence token included when one was sampled.
    sampling_logprob:  [L] fp32 on the CPU, log-probabilities under the distribution that was sampled from
                       (temperature applied); NaN where the engine did not report one.
    finished:          it ended by itself (end of sequence or stop), not by the length limit.
    text:              the decoded completion, without special tokens.
    weights_version:   how many times its engine had taken the weights over when it began the sample.

    rewards:           by function name; NaN = that function failed on this sample.
    reward:            weighted sum; NaN = the sample failed, it leaves every statistic and does not train.
    extra:             columns a reward function logged for the table of completions.
    advantage:         0 for a failed sample. With `advantages`: the reward less its baseline, which they come from.
    old_logprob:       [L] fp32 on the CPU under the policy that started the update; None = on-policy.
    ref_logprob:       [L] fp32 on the CPU under the reference model; None = no KL term.
    values:            [L] fp32 on the CPU, what the critic thought before the update of the state each token was chosen
                       in; None = no critic.
    returns:           [L] fp32 on the CPU, what the critic is to think instead.
    advantages:        [L] fp32 on the CPU, one per token; None = all have `advantage`.
    """

    prompt: Prompt
    group: int
    token_ids: list[int]
    sampling_logprob: Tensor
    finished: bool
    text: str = ""
    weights_version: int = 0

    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = float("nan")
    extra: dict[str, Any] = field(default_factory=dict)
    advantage: float = 0.0
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    advantages: Tensor | None = None

    @property
    def failed(self) -> bool:
        """No valid reward: out of the statistics and the denominators."""
        return self.reward != self.reward

    @property
    def dead(self) -> bool:
        """Is the advantage of every token exactly 0?"""
        return self.advantage == 0.0 if self.advantages is None else not bool(self.advantages.any())

    @property
    def num_tokens(self) -> int:
        """L, the completion's length in tokens."""
        return len(self.token_ids)

    @property
    def completion(self) -> str | list[Message]:
        """What the rewards see: the text, or one assistant message when the prompt was a chat."""
        if isinstance(self.prompt.content, str):
            return self.text
        return [{"role": "assistant", "content": self.text}]

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: processes send one another thousands, and a tensor by itself takes it 50 us."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        numbers = {
            n: x.numpy().tobytes() for n, x in values.items() if isinstance(x, Tensor) and x.dtype == torch.float32
        }
        return _rollout, (values | dict.fromkeys(numbers), numbers)


def _rollout(values: dict[str, Any], numbers: dict[str, bytes]) -> Rollout:
    tensors = {
        n: torch.frombuffer(bytearray(x), dtype=torch.float32) if x else torch.zeros(0) for n, x in numbers.items()
    }
    return Rollout(**values | tensors)


FOR_POLICY = ("sampling_logprob", "old_logprob", "ref_logprob", "advantages")
FOR_CRITIC = ("values", "returns")
PER_TOKEN = (*FOR_POLICY, *FOR_CRITIC)
"""What a `Rollout` may hold one of for each of its tokens, by whose loss needs it."""


def hand_out(values: Tensor, rollouts: list[Rollout], name: str) -> None:
    """Give each rollout its part of the [N] values of their tokens, one rollout after the other: `name`, on the CPU."""
    for rollout, part in zip(rollouts, values.cpu().split([r.num_tokens for r in rollouts]), strict=True):
        setattr(rollout, name, part.clone())


@dataclass(slots=True)
class RolloutBatch:
    """The scored rollouts of one collection, and how many optimizer steps they have served.

    metrics: its own figures (reward, lengths, ...), repeated on the line of every step it serves.
    used:    steps done with it, up to num_iterations * num_minibatches.
    """

    rollouts: list[Rollout]
    metrics: dict[str, float]
    used: int = 0


@dataclass(frozen=True, slots=True)
class Denominators:
    """What the losses of one optimizer step are divided by, whatever the micro-batches.

    num_sequences: valid samples, those of truncated completions included.
    num_tokens:    their tokens that train.
    """

    num_sequences: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a forward pass costs, in FLOPs: how packing weighs one micro-batch against another.

    per_token:  the decoder's matrix products, for every packed token.
    per_scored: the LM head's, for every token that is scored.
    attention:  per (window, FLOPs of a query with a key): the layers of one window (None: a query sees all before it).
    """

    per_token: float
    per_scored: float
    attention: tuple[tuple[int | None, float], ...]

    def of(self, prompt: int, completions: list[int]) -> float:
        """The FLOPs of a prompt and the completions that share it, all of whose tokens are scored."""
        tokens, attended = sum(completions), 0.0
        for window, flops in self.attention:
            own = _pairs(prompt, window)
            attended += flops * (own + sum(_pairs(prompt + c, window) - own for c in completions))
        return self.per_token * (prompt + tokens) + self.per_scored * tokens + attended


def _pairs(length: int, window: int | None) -> int:
    """Queries with the keys they see, in a causal sequence."""
    ramp = length if window is None else min(length, window)
    return ramp * (ramp + 1) // 2 + (length - ramp) * ramp


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch: T tokens in one row without padding, N of them scored, S completions.

    Rows: the shared prompts, then the sequences that share nothing, each with its prompt, then the completions of the
    first shared prompt, of the second, ... A sequence that shares nothing counts as a prompt without completions.

    input_ids:        [T] int64.
    layout:           which rows are which prompt and completion, for attention, and their positions.
    predictor_index:  [N] int64, the row whose hidden state predicts each scored token.
    target:           [N] int64, the scored tokens.
    cu_seqlens:       [S+1] int32, completion s owns rows cu_seqlens[s]:cu_seqlens[s+1] of the N.
    advantage:        [S] fp32, or [N] when each token has its own.
    old_logprob, ref_logprob, sampling_logprob: [N] fp32 or None.
    values, returns:  [N] fp32 or None: the critic's, before the update, and what it is to learn.
    members:          position of each completion in the list that was packed.
    work:             FLOPs of its forward pass; tokens where no `Work` was given.
    """

    input_ids: Tensor
    layout: PackedLayout
    predictor_index: Tensor
    target: Tensor
    cu_seqlens: Tensor
    advantage: Tensor
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    sampling_logprob: Tensor | None
    values: Tensor | None
    returns: Tensor | None
    members: tuple[int, ...]
    work: float

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch and its layout."""
        own = (getattr(self, field.name) for field in fields(self))
        return [x for x in own if isinstance(x, Tensor)] + self.layout.tensors()

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with every tensor on `device`; from the CPU to a GPU without waiting for either."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        pin = device.type == "cuda" and self.input_ids.device.type == "cpu"
        tensors = {name: x.pin_memory() if pin else x for name, x in values.items() if isinstance(x, Tensor)}
        moved = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return PackedBatch(**values | moved | {"layout": self.layout.to(device)})


@dataclass(frozen=True, slots=True)
class LMHead:
    """logits = softcap(logit_scale * (hidden @ weight.T + bias)), with softcap(x) = cap * tanh(x / cap).

    weight [V, D], bias [V] or None; logit_scale 1 and softcap None for most models (Cohere, Granite scale; Gemma caps).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]: the plain formula, for the self-check only."""
        z = self.logit_scale * torch.nn.functional.linear(hidden, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(slots=True)
class TrainState:
    """The counters that decide the future of a run; the checkpoint holds them beside weights and optimizer.

    step:            optimizer steps done.
    prompts_drawn:   prompts taken from the data order so far (position in the endless shuffled stream).
    batches_done:    rollout batches begun so far; seeds the sampler of the next one.
    skipped_in_row:  steps in a row skipped for a non-finite gradient.
    skipped_steps:   the same, in total.
    num_tokens:      tokens seen in total (prompts and completions).
    too_long:        rows of the data set found too long to be prompts.
    summary:         figures kept for the run's summary, such as accuracy_before.
    """

    step: int = 0
    prompts_drawn: int = 0
    batches_done: int = 0
    skipped_in_row: int = 0
    skipped_steps: int = 0
    num_tokens: int = 0
    too_long: list[int] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn.

    max_tokens:     longest completion.
    temperature:    logits are divided by it; 0 takes the likeliest token, with log-prob 0.
    seed:           the same seed, prompts and weights give the same completions.
    stop_token_ids: tokens that end a completion, beside the tokenizer's and model's end-of-sequence tokens.
    stop_strings:   pieces of text that end it, with the token that completes one of them.
    top_k:          only the k likeliest tokens; 0 = all. The filters follow the temperature, in this order.
    top_p:          only the likeliest tokens that together reach this probability; 1 = all.
    min_p:          only tokens at least this likely, relative to the likeliest; 0 = all.
    first_group:    the first prompt's place among all, where the list is a process's share: its samples are then those
                    that one process alone would draw.

    Log-probs are those of the distribution that is left, renormalised. The training forward knows no filters.
    """

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    first_group: int = 0
