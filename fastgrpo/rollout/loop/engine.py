"""The loop engine: samples from the training model itself, in this process, so there is nothing to sync.

Keys and values are its own: prompts once per group, finished rows replaced at once, memory bounded by `batch_size`.
A model that cannot be decoded so runs over transformers' cache; `reason` says why. Not done here: several devices.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from fastgrpo.errors import RunError
from fastgrpo.layers import Body, StockBody, fuse
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop.burst import Plan, Session, SlotDecoder
from fastgrpo.rollout.loop.cache import Row, SlabCache
from fastgrpo.rollout.loop.check import compare, why_not
from fastgrpo.rollout.loop.decoder import Decoder, Ended
from fastgrpo.rollout.loop.plain import PlainRow, decode_plainly
from fastgrpo.rollout.loop.slabs import KeyShape
from fastgrpo.rollout.loop.slots import SlotCache, why_not_slots
from fastgrpo.rollout.stopping import Stopping

logger = logging.getLogger(__name__)

# Of a GPU's memory, what may stay taken while the policy trains: preparing graphs anew takes seconds.
_KEPT_SHARE = 0.2


class LoopEngine:
    """Generates with a transformers model in this process.

    model:       a causal (or PEFT) model with this project's attention; put into eval() while it generates, and back.
    tokenizer:   decodes, and names the end-of-sequence token.
    batch_size:  completions decoded at once.
    timeout:     seconds that one `generate` may take; None = any.

    reason:      why the model runs over transformers' own cache, slower; None when it does not, or was not yet asked.
    unfused:     why layers run as transformers has them, in many kernels; None when they do not.
    unslotted:   why keys and values are not in slots of fixed size, as a GPU wants them; None when they are.
    uncaptured:  why the last `generate` ran without CUDA graphs; None when it had them.
    cache_bytes: memory that keys and values took in the last `generate`; 0 over transformers' cache.

    On a GPU the slots and the graphs that read them are kept from one `generate` to the next while they fit, also
    asleep if they take less than a fifth of the GPU's memory.

    The same seed, prompts, weights and options give the same tokens, bit for bit on one machine, whatever was generated
    before; on a GPU where memory is short, only if it was as short before. Each sample's random numbers are its own, so
    another batch_size changes tokens only where rounding does.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 256, timeout: float | None = None) -> None:
        self.timeout = timeout
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.version = 0
        self.end_tokens = end_tokens_of(model, tokenizer)
        self.reason: str | None = None
        self.unfused: str | None = "not asked yet"
        self.unslotted: str | None = "not asked yet"
        self.uncaptured: str | None = "not asked yet"
        self.cache_bytes = 0
        self._told: str | None = None
        self._shape: KeyShape | None = None
        self._body: Body = StockBody(model)
        self._session: Session | None = None

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Sampling, done: Callable[[list[Rollout]], None] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        if not prompts:
            return []
        stopping = Stopping(self.tokenizer, self.end_tokens | set(sampling.stop_token_ids), sampling.stop_strings)
        samples: dict[int, Rollout] = {}
        groups: dict[int, list[Rollout]] = {}
        missing = [n] * len(prompts)

        def ended(row: Row | PlainRow, by_itself: bool) -> None:
            group = row.sample // n
            samples[row.sample] = self._rollout(prompts[group], group, row, by_itself)
            missing[group] -= 1
            if not missing[group]:
                groups[group] = [samples.pop(i) for i in range(group * n, (group + 1) * n)]
                if done is not None:
                    done(groups[group])

        deadline = time.monotonic() + (math.inf if self.timeout is None else self.timeout)

        def check() -> None:
            if time.monotonic() > deadline:
                raise RunError(
                    f"rollouts took longer than rollout_timeout={self.timeout:g} s: {len(groups)} of {len(prompts)} "
                    "prompts were done"
                )

        was_training = self.model.training
        self.model.eval()
        try:
            if self._shape is None and self.reason is None:
                self._ask()
            ids = [prompt.token_ids for prompt in prompts]
            if self._shape is None:
                decode_plainly(self.model, ids, n, sampling, stopping, self.batch_size, ended, check)
            else:
                self._decode(self._shape, ids, n, sampling, stopping, ended, check)
            self._tell()
        finally:
            self.model.train(was_training)
        return [rollout for group in range(len(prompts)) for rollout in groups[group]]

    def sync(self, policy: Any) -> None:
        """The weights are the policy's own."""
        self.version += 1

    def sleep(self) -> None:
        """Free slots and graphs, unless they are small."""
        if self._session is not None and self._session.cache.nbytes > _kept_bytes(self._session.uniforms.device):
            self._session = None

    def wake(self) -> None:
        """Memory is taken by `generate`."""

    def close(self) -> None:
        """Free slots and graphs; a later `generate` makes them again."""
        self._session = None

    def _ask(self) -> None:
        """Which way this model goes on this device; by trying it."""
        self._shape, self.reason = why_not(self.model)
        if self._shape is None:
            return
        fused, self.unfused = fuse(self.model)
        self._body = fused or self._body
        self.unslotted = why_not_slots(self._shape)
        if self.unslotted is None:
            try:
                cache = SlotCache(self._shape, rows=3, groups=2, longest_prompt=5, longest_completion=3)
                self.unslotted = compare(self.model, self._body, cache)
                cache = SlotCache(self._shape, rows=3, groups=2, longest_prompt=5, longest_completion=3)
                cache.longest = 4096  # paths are then split
                self.unslotted = self.unslotted or compare(self.model, self._body, cache)
            except Exception as error:  # what the kernels do not take; slabs take everything
                self.unslotted = f"{type(error).__name__}: {error}"

    def _tell(self) -> None:
        """Once, and when it changes: what makes it slower than it could be on this GPU."""
        reasons = [self.reason] if self.reason else [self.unfused, self.unslotted, self.uncaptured]
        slower = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        if slower and slower != self._told and next(self.model.parameters()).is_cuda:
            logger.warning("rollouts are slower than they could be: %s", slower)
        self._told = slower

    def _decode(
        self,
        shape: KeyShape,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        stopping: Stopping,
        ended: Ended,
        check: Callable[[], None],
    ) -> None:
        rows = min(self.batch_size, len(prompts) * n)
        longest = max(len(ids) for ids in prompts)
        if self.unslotted is not None:
            cache = SlabCache(shape, rows=rows, longest_prompt=longest, longest_completion=sampling.max_tokens)
            Decoder(self._body, cache, sampling, stopping, rows).run(prompts, n, ended, check)
            self.cache_bytes, self.uncaptured = cache.nbytes, "keys and values are not in slots"
            return
        session, self._session = self._session, None  # one that is cut short is not gone on with
        plan = Plan.of(self.model, rows, n, longest, sampling)
        if session is None or not session.asked.serves(plan):
            before = None if session is None else session.asked
            session = None  # its memory first
            session = Session.make(plan, shape, n, before)
        SlotDecoder(self._body, session, plan, sampling, stopping).run(prompts, n, ended, check)
        self.cache_bytes, self.uncaptured = session.cache.nbytes, session.reason
        self._session = session

    def _rollout(self, prompt: Prompt, group: int, row: Row | PlainRow, by_itself: bool) -> Rollout:
        return Rollout(
            prompt,
            group,
            row.tokens,
            torch.tensor(row.logprobs, dtype=torch.float32),
            finished=by_itself,
            text=self.tokenizer.decode(row.tokens, skip_special_tokens=True),
            weights_version=self.version,
        )


def end_tokens_of(model: Any, tokenizer: Any) -> set[int]:
    """The end-of-sequence tokens of the model's generation config and of the tokenizer."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
    return {i for i in ids if i is not None}


def _kept_bytes(device: torch.device) -> float:
    return _KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0.0
