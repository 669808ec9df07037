"""What the trainer asks of whatever generates."""

from __future__ import annotations

from typing import Any, Protocol

from fastgrpo.records import Prompt, Rollout, Sampling


class Engine(Protocol):
    """Token ids in; token ids and the log-probs of the true sampling distribution out."""

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling) -> list[Rollout]:
        """`n` completions of every prompt, those of one prompt together; `group` is the prompt's place in the list.

        Sampled from the weights as they stand after the last `sync`; the same seed gives the same tokens.
        """

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights; called after every optimizer step and after loading a checkpoint."""

    def sleep(self) -> None:
        """Give device memory back while the policy trains."""

    def wake(self) -> None:
        """Take it again before the next `generate`."""

    def close(self) -> None:
        """Release everything."""


def make_engine(name: str, policy: Any, *, batch_size: int) -> Engine:
    """The engine `rollout_engine` names. "auto" takes the best one at hand, today always "loop"."""
    from fastgrpo.rollout.loop import LoopEngine

    if name not in ("auto", "loop"):
        raise ValueError(f"rollout_engine={name!r} must be auto or loop")
    return LoopEngine(policy.model, policy.tokenizer, batch_size=batch_size)
