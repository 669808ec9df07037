"""transformers' `TrainerCallback`s on a fastgrpo run, and the `TrainerState` that rewards see.

Events: train begin and end, step begin and end, log, evaluate, save. Of `TrainerControl`, `should_training_stop`,
`should_evaluate` and `should_save` are obeyed. Events of the inside of a step (gradients, substeps) do not exist here.
Of several processes each calls its own callbacks, if it has any; what one of them wishes, all do.
`args` is a GRPOConfig: callbacks that need TrainingArguments' own fields, such as EarlyStoppingCallback, do not work.
"""

from __future__ import annotations

from typing import Any

from fastgrpo.distributed import Ranks

_WISHES = ("should_training_stop", "should_evaluate", "should_save")


class Callbacks:
    """Calls the user's callbacks, in order, as transformers' Trainer does."""

    def __init__(
        self, callbacks: list[Any], args: Any, policy: Any, optimizer: Any, ranks: Ranks | None = None
    ) -> None:
        from transformers import TrainerControl, TrainerState

        self.control = TrainerControl()
        self._ranks = ranks or Ranks()
        first = self._ranks.first
        self.state = TrainerState(is_local_process_zero=first, is_world_process_zero=first)
        # All must take part in what `fire` gathers, also those whose script gives callbacks to the first alone.
        self._gathers = not self._ranks.alone and any(self._ranks.gather("callbacks", bool(callbacks)))
        self._args = args
        self._callbacks = [c() if isinstance(c, type) else c for c in callbacks]
        self._given = {"model": policy.model, "processing_class": policy.tokenizer, "optimizer": optimizer}

    def at(self, step: int, max_steps: int, num_tokens: int) -> Any:
        """Bring the state up to date; returns it."""
        self.state.global_step = step
        self.state.max_steps = max_steps
        self.state.num_input_tokens_seen = num_tokens
        return self.state

    def fire(self, event: str, **details: Any) -> None:
        """Call `event` (such as "on_step_end") on every callback. What one raises goes through."""
        for callback in self._callbacks:
            handler = getattr(callback, event, None)
            if handler is not None:
                result = handler(self._args, self.state, self.control, **self._given, **details)
                if result is not None:
                    self.control = result
        if self._gathers:
            wishes = self._ranks.gather(event, [bool(getattr(self.control, name)) for name in _WISHES])
            for name, everybody in zip(_WISHES, zip(*wishes, strict=True), strict=True):
                setattr(self.control, name, any(everybody))

    def take(self, wish: str) -> bool:
        """Has a callback set `should_evaluate` or `should_save`? The wish is granted once."""
        wanted = bool(getattr(self.control, wish))
        setattr(self.control, wish, False)
        return wanted

    @property
    def stop(self) -> bool:
        """A callback wants the run to end after this step."""
        return bool(self.control.should_training_stop)
