"""The host's cost of decoding over slots: CPU seconds of a `generate` whose bursts are given tokens, no forward's.

    python -m benchmarks.rollout_host [--rounds 5]

All is the loop engine's own but `Session.burst`, which is not counted. `critical` is from a burst's tokens to the next
launch, while a GPU waits; `deferred` and `texts` come behind it. What a GPU's launches and copies take is not in it.
Printed are the constants of `benchmarks.gpu.predict_rollout` and the seconds of a `generate`, medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import string
import time
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.small_model import Shape, make_model
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine, engine
from fastgrpo.rollout.loop.burst import Plan, Session, SlotDecoder
from fastgrpo.rollout.loop.slabs import KeyShape
from fastgrpo.rollout.loop.slots import BURST

_PROMPTS, _N, _MEAN, _LONGEST, _VOCABULARY = 64, 16, 300, 1024, 151_936
_SHAPE = Shape("host", 256, width=32, feed_forward=32, layers=1, heads=2, kv_heads=1, head_dim=16)


class Clock:
    """CPU seconds of this thread by phase, anew for each burst: from its launch to the next one's."""

    def __init__(self) -> None:
        self.bursts: list[dict[str, float]] = [{}]
        self.phase, self.since = "start", time.thread_time()

    def enter(self, phase: str) -> str:
        """From here on; returns the phase so far."""
        now, before, spent = time.thread_time(), self.phase, self.bursts[-1]
        self.phase, self.since, spent[before] = phase, now, spent.get(before, 0.0) + now - self.since
        return before


class Given(Session):
    """Its bursts' tokens are random, and end a row with probability 1 / mean, as the last of the vocabulary."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.clock, self.random = Clock(), torch.Generator().manual_seed(0)

    def burst(self, *_: Any) -> Any:
        return self

    def run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        self.clock.enter("given")
        number = torch.rand(BURST, state.shape[1], generator=self.random)
        tokens = torch.where(number < 1 / _MEAN, _VOCABULARY - 1, (number * (_VOCABULARY - 1)).long())
        self.clock.bursts.append({"alive": state.shape[1]})
        self.clock.enter("deferred")
        return tokens, -number


def make_tokenizer() -> Any:
    """Bytes merged into pieces of four to eight, as many as Qwen2.5 has; half of them bring the space before them."""
    draw, letters = Random(0).choices, string.ascii_lowercase
    words = sorted({"".join(draw(letters, k=4 + i % 5)) for i in range(2 * _VOCABULARY)})
    pieces = [("Ġ" if len(word) % 2 else "") + word for word in words][: _VOCABULARY - 1]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*pieces, "<end>"])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def measure(tokenizer: Any, prompts: int = _PROMPTS) -> tuple[list[dict[str, float]], list[Rollout]]:
    """A `generate`, and its seconds by phase: before the first launch, then of each burst, with its rows."""
    loop, sampling = LoopEngine(make_model(_SHAPE, packed=True), tokenizer, batch_size=prompts * _N), Sampling(_LONGEST)
    loop.unslotted = None
    loop._shape = KeyShape(_SHAPE.layers, _SHAPE.kv_heads, _SHAPE.head_dim, torch.float32, torch.device("cpu"))
    loop._session = session = Given.make(Plan.of(loop.model, prompts * _N, _N, 8, sampling), loop._shape, _N)
    clock = session.clock

    class Timed(SlotDecoder):
        def _keep(self, *args: Any) -> Any:
            clock.enter("critical")
            return super()._keep(*args)

        def _deliver(self, *args: Any) -> None:
            clock.enter("deferred")
            super()._deliver(*args)

    def decode(*args: Any, call: Any = tokenizer.decode, **options: Any) -> str:
        before, text = clock.enter("texts"), call(*args, **options)
        clock.enter(before)
        return text

    with patch.object(engine, "SlotDecoder", Timed), patch.object(tokenizer, "decode", decode):
        made = loop.generate([Prompt(i, "", [1 + i] * 8) for i in range(prompts)], _N, sampling)
    clock.enter("end")
    return clock.bursts, made


def constants(rounds: int) -> dict[str, float]:
    """Medians of as many rounds, after one that warms up."""
    tokenizer = make_tokenizer()
    (_, made), *runs = [measure(tokenizer) for _ in range(rounds + 1)]
    names = ("critical", "deferred", "texts", "alive")
    spent = {name: np.median([[b.get(name, 0.0) for b in bursts] for bursts, _ in runs], 0) for name in names}
    alive, tokens = spent.pop("alive")[1:], sum(r.num_tokens for r in made)
    slope, base = np.polyfit(alive[:-1], spent["critical"][1:-1], 1)  # after the last one nothing is launched
    found = {"BURST_HOST": base, "ROW_HOST": slope, "ROW_BEGUN": spent["critical"][0] / len(made)}
    found |= {"TOKEN_LISTED": spent["deferred"].sum() / tokens, "TOKEN_TEXT": spent["texts"].sum() / tokens}
    found |= {name: seconds.sum() for name, seconds in spent.items()}
    found |= {"behind the last burst": spent["deferred"][-1] + spent["texts"][-1]}
    return {name: float(f"{seconds:.3g}") for name, seconds in found.items()} | {"bursts": len(alive), "tokens": tokens}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_host", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    torch.set_num_threads(1)
    print(json.dumps(constants(parser.parse_args().rounds), indent=1))
