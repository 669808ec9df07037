"""Whole optimizer steps, data to new weights, against TRL 1.16's own GRPOTrainer.

Sampling, rewards, advantages, loss, backward and AdamW's step, with the data loading and the metrics each does by
itself. Both get the same weights, prompts in the same order, reward function and settings: dapo, beta 0, temperature 1
without filters, a constant learning rate, fp32, one thread. `demo` is examples/arithmetic.py's model and task; `long`
(in MORE) a model of random weights whose completions have geometric lengths.

`python -m benchmarks.test_train_trl` takes turns, step by step, and prints the wall and CPU time of each.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import os
import random
import runpy
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks.cases import OURS, Case
from benchmarks.small_model import SMALL, make_ending, make_model, make_word_tokenizer
from fastgrpo import GRPOConfig, GRPOTrainer

Task = tuple[Any, Any, Dataset]
"""Model, tokenizer, rows with `prompt` and `answer`."""

_GENERATIONS = 8
_END = 1  # the token that ends a completion of `long`
_MEAN = 55  # tokens of its completions, before the limit


@dataclass(frozen=True)
class Setting:
    """One size. score: (completion, its token ids, answer) -> reward. micro_batch: completions in a forward of TRL."""

    name: str
    model: str
    prompts: int
    max_tokens: int
    learning_rate: float
    mean_tokens: float
    task: Callable[[], Task]
    score: Callable[[str, list[int], str], float]
    micro_batch: int
    required: float


@dataclass(frozen=True)
class Step:
    """What one optimizer step sampled, a prompt's completions together, and the metrics its trainer logged."""

    prompts: list[str]
    completions: list[list[int]]
    rewards: list[float]
    logs: dict[str, float]

    @property
    def lengths(self) -> list[int]:
        return [len(c) for c in self.completions]


@cache
def demo() -> Task:
    """The demo's own, warmed up."""
    arithmetic = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "arithmetic.py"))
    model, tokenizer = arithmetic["model"]()
    return model, tokenizer, arithmetic["train_dataset"]()


@cache
def long() -> Task:
    """Prompts of 60 to 140 random words, and completions that end after each token with probability 1 / 55."""
    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(str(rng.randrange(2, SMALL.vocabulary)) for _ in range(rng.randint(60, 140))), "answer": ""}
        for _ in range(512)
    ]
    tokenizer = make_word_tokenizer(SMALL.vocabulary)
    model = make_model(SMALL, packed=False)
    make_ending(model, [tokenizer(row["prompt"]).input_ids for row in rows[:16]], end=_END, mean=_MEAN)
    return model, tokenizer, Dataset.from_list(rows)


def _exact(completion: str, token_ids: list[int], answer: str) -> float:
    return float(completion == answer)


def _share_even(completion: str, token_ids: list[int], answer: str) -> float:
    """Hardly ever the same in a whole group: nothing for a trainer to leave out."""
    return sum(t % 2 == 0 for t in token_ids) / len(token_ids)


_DEMO = Setting("demo", "qwen3-0.33m", 32, 5, 2e-4, 4.0, demo, _exact, micro_batch=256, required=2.0)
_LONG = Setting("long", SMALL.name, 16, 256, 1e-6, _MEAN, long, _share_even, micro_batch=16, required=6.0)


class Stepper(TrainerCallback):
    """A trainer in a thread of its own, which waits after every step's log until `step` asks for the next one.

    make: (reward function, this callback, folder for what the trainer writes) -> trainer. The thread, a daemon, waits
    for ever when nobody asks any more.
    """

    def __init__(self, setting: Setting, make: Callable[[Setting, Any, Any, str], Any]) -> None:
        self.setting = setting
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._step: Step
        self._scored: tuple[list[str], list[list[int]], list[float]]
        self._folder = tempfile.TemporaryDirectory(prefix="fastgrpo-benchmark-")
        self._trainer = make(setting, self._reward, self, self._folder.name)
        threading.Thread(target=self._train, daemon=True).start()

    def step(self) -> Step:
        """Let the trainer go on to the end of its next step, the first with what `train` does before it."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._step = Step(*self._scored, logs=dict(logs))
        self._done.release()
        self._go.acquire()

    def _train(self) -> None:
        torch.set_num_threads(1)
        self._go.acquire()
        try:
            self._trainer.train()
        except BaseException as error:  # raised again where `step` was called
            self._error = error
        self._done.release()

    def _reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        rewards = [self.setting.score(*x) for x in zip(completions, completion_ids, answer, strict=True)]
        self._scored = list(prompts), [list(ids) for ids in completion_ids], rewards
        return rewards


_ENOUGH = 100_000  # steps; nobody asks for so many


def make_ours(setting: Setting, reward: Any, callback: Any, folder: str) -> GRPOTrainer:
    """Defaults but for what is named: metrics and completions are written at every step."""
    model, tokenizer, rows = setting.task()
    config = GRPOConfig(
        output_dir=folder,
        max_steps=_ENOUGH,
        device="cpu",
        num_threads=1,
        num_prompts_per_step=setting.prompts,
        num_generations=_GENERATIONS,
        max_completion_length=setting.max_tokens,
        learning_rate=setting.learning_rate,
        shuffle_dataset=False,
        report_to=[],
        disable_progress=True,
        save_steps=0,
    )
    return GRPOTrainer(
        copy.deepcopy(model), [reward], config, rows, processing_class=copy.deepcopy(tokenizer), callbacks=[callback]
    )


def make_trl(setting: Setting, reward: Any, callback: Any, folder: str) -> Any:
    """TRL's defaults, which are ours, but for what is named. What slows it down on a CPU is off; it writes nothing."""
    package: Any = importlib.import_module("trl")
    model, tokenizer, rows = setting.task()
    config = package.GRPOConfig(
        output_dir=folder,
        max_steps=_ENOUGH,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=setting.prompts * _GENERATIONS // setting.micro_batch,
        num_generations=_GENERATIONS,
        max_completion_length=setting.max_tokens,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = package.GRPOTrainer(
        copy.deepcopy(model), [reward], config, rows, processing_class=copy.deepcopy(tokenizer), callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


_PEERS: dict[str, Callable[[Setting, Any, Any, str], Any]] = {"trl": make_trl, OURS: make_ours}


@cache
def _stepper(setting: Setting, peer: str) -> Stepper:
    return Stepper(setting, _PEERS[peer])


def inputs(seed: int, setting: Setting, peer: str) -> Stepper:
    """The same trainer in every round: its own next step is the round's."""
    return _stepper(setting, peer)


def train_step(x: Stepper) -> Step:
    return x.step()


_first: dict[str, Step] = {}  # of a setting, the first step of the peer that came first


@torch.no_grad()
def errors(x: Stepper, step: Step) -> dict[str, float]:
    """Of a first step, sampled from the weights that all peers start from.

    surprise: the sampled tokens' mean log-prob by transformers' full forward, each completion alone, against minus the
    mean entropy, which it must be when tokens are drawn from the model's distribution, in standard errors.
    length, reward: the means' distance to those of the peer that came first, in standard errors.
    logprob: the log-probs reported by the engine against those of the training forward, the largest difference.
    loss: 0 when finite.
    """
    model, tokenizer, _ = x.setting.task()
    other = _first.setdefault(x.setting.name, step)
    assert step.prompts == other.prompts
    assert len(step.completions) == x.setting.prompts * _GENERATIONS
    assert all(len(c) == x.setting.max_tokens or c[-1] == tokenizer.eos_token_id for c in step.completions)
    excess = []
    for prompt, tokens in zip(step.prompts, step.completions, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids + tokens])
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(tokens) - 1 : -1]
        distribution = torch.log_softmax(logits.double(), -1)
        logprob = distribution.gather(1, ids[0, -len(tokens) :, None]).squeeze(1)
        excess.append(logprob - (distribution.exp() * distribution).sum(1))
    every = torch.cat(excess)
    return {
        "surprise": (every.mean().abs() / every.std() * every.numel() ** 0.5).item(),
        "length": _standard_errors(step.lengths, other.lengths),
        "reward": _standard_errors(step.rewards, other.rewards),
        "logprob": step.logs.get("sampling/sampling_logp_difference/max", 0.0),
        "loss": 0.0 if math.isfinite(step.logs["loss"]) else math.nan,
    }


def _standard_errors(a: Sequence[float], b: Sequence[float]) -> float:
    """The distance of two samples' means."""
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    return difference / math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a)) if difference else 0.0


def _cases(setting: Setting, rounds: int) -> list[Case]:
    return [
        Case(
            op="train_trl",
            peer=peer,
            params={
                "setting": setting.name,
                "model": setting.model,
                "prompts": setting.prompts,
                "n": _GENERATIONS,
                "max_tokens": setting.max_tokens,
            },
            tokens=round(setting.prompts * _GENERATIONS * setting.mean_tokens),
            inputs=partial(inputs, setting=setting, peer=peer),
            run=train_step,
            errors=errors,
            tolerance={"surprise": 4.0, "length": 4.0, "reward": 4.0, "logprob": 1e-4, "loss": 0.0},
            rounds=rounds,
            needs=None if peer == OURS else "trl",
            weighed=False,  # a trainer cannot be handed to another process
        )
        for peer in _PEERS
    ]


CASES = _cases(_DEMO, rounds=5)
MORE = _cases(_LONG, rounds=2)


def test_train_trl(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)


def compare(cases: Sequence[Case], required: float, rounds: int) -> bool:
    """Check a step of each, then time `rounds` by turns and print them; whether ours is fast enough by CPU time."""
    print(f"{cases[0].size}: {rounds} rounds, {torch.get_num_threads()} thread, load {os.getloadavg()[0]:.2f}")
    for case in cases:
        x = case.inputs(0)
        found = case.errors(x, case.run(x))
        print(f"  {case.peer:9} checked: {', '.join(f'{k} {v:.2g}' for k, v in found.items())}", flush=True)
        if wrong := case.wrong(found):
            raise ValueError(f"{case.name} is wrong: {wrong}, allowed {case.tolerance}")
    seconds: dict[str, dict[str, list[float]]] = {k: {c.peer: [] for c in cases} for k in ("wall", "CPU")}
    lengths: dict[str, list[int]] = {c.peer: [] for c in cases}
    for i in range(rounds):
        for case in cases:
            x, wall, cpu = case.inputs(i), -time.perf_counter(), -time.process_time()
            step = case.run(x)
            wall, cpu = wall + time.perf_counter(), cpu + time.process_time()
            seconds["wall"][case.peer].append(wall)
            seconds["CPU"][case.peer].append(cpu)
            lengths[case.peer] += step.lengths
            print(
                f"  {i + 1:2} {case.peer:9} wall {wall:7.3f} s, CPU {cpu:7.3f} s; loss {step.logs['loss']:+.4f}, "
                f"reward {statistics.fmean(step.rewards):.3f}; tokens: mean {statistics.fmean(step.lengths):.1f}, "
                f"longest {max(step.lengths)}",
                flush=True,
            )
    return _reached(seconds, lengths, required)


def _reached(seconds: dict[str, dict[str, list[float]]], lengths: dict[str, list[int]], required: float) -> bool:
    """Print steps per second and their ratios; are they enough by CPU time, and the completions alike in length?"""
    reached, mean = True, {peer: statistics.fmean(each) for peer, each in lengths.items()}
    for peer in lengths.keys() - {OURS}:
        for clock, by_peer in seconds.items():
            a, b = by_peer[peer], by_peer[OURS]
            each = statistics.median(x / y for x, y in zip(a, b, strict=True))
            print(
                f"  {clock}: {peer} {len(a) / sum(a):.3f} steps/s, ours {len(b) / sum(b):.3f}: {sum(a) / sum(b):.2f} x "
                f"(round by round {each:.2f} x; required {required:g} x)"
            )
        apart = mean[OURS] / mean[peer] - 1
        print(f"  mean completion: {peer} {mean[peer]:.2f} tokens, ours {apart:+.1%} (allowed 15 %)", flush=True)
        reached = reached and abs(apart) <= 0.15 and sum(seconds["CPU"][peer]) >= required * sum(seconds["CPU"][OURS])
    return reached


def main() -> int:
    """Whole training steps against TRL by turns; 1 when ours misses the required ratio or completions differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.test_train_trl", description=main.__doc__)
    parser.add_argument("-k", dest="word", default="", help="only the settings that contain this: demo, long")
    parser.add_argument("--rounds", type=int, help="default: 5 of demo, 2 of long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    required = {s.name: s.required for s in (_DEMO, _LONG)}
    chosen = [c for c in [*CASES, *MORE] if arguments.word in c.params["setting"] and not c.absent]
    reached = [
        compare(list(group), required[name], arguments.rounds or rounds)
        for (name, rounds), group in groupby(chosen, key=lambda c: (c.params["setting"], c.rounds))
    ]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
