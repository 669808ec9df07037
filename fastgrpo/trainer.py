"""GRPOTrainer: the loop.

    prompts -> rollouts -> rewards -> advantages -> packing -> hidden states -> loss -> gradients -> new weights

The stages stand in files of their own and do not know one another; `collect.py` and `update.py` lead a batch through
them, `recorder.py` writes down what happened. With several processes, a GPU each, all run this loop side by side:
`distributed.py` says who does what.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastgrpo.checkpoint import CheckpointStore
from fastgrpo.collect import Collector
from fastgrpo.config import ConfigError, GRPOConfig
from fastgrpo.data import PromptSource
from fastgrpo.distributed import Ranks
from fastgrpo.errors import RunError
from fastgrpo.evaluation import evaluate
from fastgrpo.integrations.callbacks import Callbacks
from fastgrpo.optim import Optimizer, learning_rate
from fastgrpo.policy import Critic, Policy, Reference, is_factory, load_policy, make_critic
from fastgrpo.recorder import Recorder, SilentRecorder, save_failed_step
from fastgrpo.records import Prompt, RolloutBatch, TrainState
from fastgrpo.rewards import RewardRunner
from fastgrpo.rollout import Engine, make_engine
from fastgrpo.run_directory import RunDirectory
from fastgrpo.seeding import derive_seed, seed_generators
from fastgrpo.signals import StopRequested, StopSignals
from fastgrpo.snapshot import MODEL_FOLDER, read_snapshot, write_part, write_snapshot
from fastgrpo.state import load_json, rng_state
from fastgrpo.task import Task, make_prompts
from fastgrpo.update import Updater


class NonFiniteGradients(RunError):
    """Several steps in a row had a gradient that is not finite."""


class GRPOTrainer:
    """Trains a language model by GRPO.

    model:            hub name, local folder, "module:function" factory, or a loaded `PreTrainedModel`.
    reward_funcs:     one reward or several: functions with TRL's signature, built-in names, "module:function",
                      reward models' names, or mappings with "name", "weight", "timeout" and options.
    args:             every other option.
    train_dataset:    `datasets.Dataset`, list of dicts, hub name, file, or "module:function"; needs a `prompt` column.
    eval_dataset:     the same, for evaluation; None = no evaluation.
    processing_class: the tokenizer, or where to find it; None = the model's own.
    peft_config:      a PEFT config, to train adapters; default: LoRA from the options when `use_peft`.
    callbacks:        transformers' `TrainerCallback`s.

    Options and rewards are checked at once; data and model are loaded by `train` and `evaluate`. Raises ValueError
    (ConfigError among them), OSError or ImportError, in one line, for what cannot be used.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.config = args or GRPOConfig()
        self.started = time.perf_counter()
        rewards = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self.task = Task(model, processing_class, train_dataset, eval_dataset, rewards, peft_config)
        self._callback_list = list(callbacks or [])
        self.rewards = RewardRunner(self.task.rewards(self.config), in_threads=self.config.overlap_rewards)
        self.config.loss_config()  # its own checks, before anything is loaded
        self.ranks = Ranks.join(cpu=self.config.device == "cpu")
        if not self.ranks.alone and ":" in self.config.device:
            raise ConfigError(
                f"device={self.config.device!r} is one, and there are {self.ranks.size} processes: leave it out"
            )
        self.directory = RunDirectory(self.config.output_dir)
        self.state = TrainState()
        self.pending: RolloutBatch | None = None
        self.source: PromptSource
        self.eval_prompts: list[Prompt] = []
        self.policy: Policy
        self.reference: Reference | None = None
        self.critic: Critic | None = None
        self.critic_optimizer: Optimizer | None = None
        self._loaded = self._trained = False
        self.engine: Engine
        self.recorder: Recorder
        self.total_steps = 0
        self._seconds_before = 0.0
        self._last_saved: Path | None = None
        self._last_saved_step: int | None = None

    # ------------------------------------------------------------------------------------------------------ the loop

    def train(self, resume: str = "auto") -> TrainState:
        """Train to the last step; returns the counters. Called again, it goes on where the run stopped.

        resume: "auto" goes on from output_dir's newest intact checkpoint if there is one, "never" begins anew, a
        checkpoint's path goes on from there.
        Raises AllRewardsFailed, NonFiniteGradients, CheckpointError; `StopRequested` after SIGTERM or Ctrl-C, once the
        state is saved.
        """
        if self._trained:
            self.started = time.perf_counter()  # the time between two calls is not the run's
        try:
            if self._open(resume):
                with StopSignals() as self.signals:
                    self.ranks.interruptible = self.signals.interruptible
                    self._run()
            elif self.ranks.first and not self.config.disable_progress:
                print(f"finished before, at step {self.state.step}: {self.directory.path}", flush=True)
        finally:
            self._close()
        return self.state

    def _run(self) -> None:
        try:
            self._begin()
            while not self._done():
                batch = self.pending or self._collect()  # prompts -> rollouts -> rewards -> advantages
                metrics = self._update(batch)  # packing -> hidden states -> loss -> gradients -> new weights
                self._record(metrics, batch)  # metrics, evaluation, checkpoint
            self._end()
        except StopRequested as stop:
            self._save()  # while signals are watched: another process may have been asked first, this one be asked yet
            self.recorder.message(f"{stop}: saved at step {self.state.step}; the same command goes on from there")
            raise

    def _close(self) -> None:
        for name in ("recorder", "collector", "engine", "optimizer", "critic_optimizer"):
            if getattr(self, name, None):
                getattr(self, name).close()
        vars(self).pop("engine", None)
        self.rewards.close()
        self.directory.release()
        self.ranks.interruptible = nullcontext

    def evaluate(self) -> dict[str, float]:
        """Sample and score the evaluation prompts with the weights as they are; returns the metrics `eval/...`."""
        if self.task.eval_dataset is None:
            raise ConfigError("eval_dataset is required for an evaluation")
        self._load_everywhere(self.task.model, train=False)
        return self._evaluate()

    def _interruptible(self) -> AbstractContextManager[None]:
        """With others, only stages that they do not wait in may be cut: see `Ranks.together`."""
        return self.signals.interruptible() if self.ranks.alone else nullcontext()

    # ----------------------------------------------------------------------------------------------------- its steps

    def _begin(self) -> None:
        self.callbacks.fire("on_train_begin")
        evaluated = "accuracy_before" in self.state.summary
        if self.state.step == 0 and self.config.eval_on_start and self.eval_prompts and not evaluated:
            with self._interruptible():
                metrics = self._evaluate()
            self.state.summary["accuracy_before"] = metrics["eval/accuracy"]
            self.recorder.line(0, metrics)
            self._mark_boundary()

    def _done(self) -> bool:
        return self.state.step >= self.total_steps or self.callbacks.stop

    def _collect(self) -> RolloutBatch:
        """A fresh rollout batch. May be cut short by a signal: it is then collected again after the resume."""
        try:
            with self._interruptible():
                self.engine.wake()
                batch = self.collector.collect(self.state, self._trainer_state())
                self.engine.sleep()
                self.updater.prepare(batch)
        except Exception as error:
            # The weights are still those of the last boundary, so what was learnt until then can be kept; by several
            # processes only if all are here.
            if self._boundary[0].step > 0 and (self.ranks.alone or error is self.ranks.known):
                self._save()
            raise
        self.state.too_long = self.source.too_long
        self.recorder.completions(self.state.step + 1, batch.rollouts)
        return batch

    def _update(self, batch: RolloutBatch) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        self.callbacks.fire("on_step_begin")
        state = self.state
        peaks = (self.config.learning_rate, self.config.critic_learning_rate)
        rates = [learning_rate(state.step + 1, self.total_steps, self.config, peak) for peak in peaks]
        metrics, applied = self.updater.step(batch, *rates)
        state.step += 1
        state.skipped_in_row = 0 if applied else state.skipped_in_row + 1
        state.skipped_steps += not applied
        if state.skipped_in_row >= self.config.max_skipped_steps:
            kept = self.ranks.from_first(
                "failed step", lambda: save_failed_step(self.directory.path, state.step, batch.rollouts)
            )
            raise NonFiniteGradients(
                f"{state.skipped_in_row} steps in a row had a non-finite gradient (the last: step {state.step}); "
                f"its rollouts are kept in {kept}"
            )
        self.pending = batch if batch.used < self.config.steps_per_batch else None
        if self.updater.moving_reference and state.step % self.config.ref_model_sync_steps == 0:
            self.updater.moving_reference.mix(self.config.ref_model_mixup_alpha)
        self.engine.sync(self.policy)
        counters = {"skipped_steps": state.skipped_steps, "num_tokens": state.num_tokens}
        return metrics | counters | {"data/skipped_prompts": len(state.too_long)}

    def _record(self, metrics: dict[str, float], batch: RolloutBatch) -> None:
        """Evaluate and save when it is time, and write the step's line before its checkpoint."""
        step = self._trainer_state().global_step
        self.callbacks.fire("on_step_end")
        last = self._done()
        due = bool(self.config.eval_steps) and step % self.config.eval_steps == 0
        wished = self.callbacks.take("should_evaluate")
        if self.eval_prompts and (due or wished or (last and self.config.eval_on_end)):
            metrics |= self._evaluate()
            self.callbacks.fire("on_evaluate", metrics=metrics)
            self.state.summary["accuracy_after"] = metrics["eval/accuracy"]
        line = self.recorder.step_line(step, metrics, batch)
        self.callbacks.fire("on_log", logs=line)
        self._mark_boundary()
        wished = self.callbacks.take("should_save")
        if last or wished or (self.config.save_steps and step % self.config.save_steps == 0):
            self._save()
            self.callbacks.fire("on_save")
        if not last:
            self.ranks.together("signals", self.signals.check)

    def _end(self) -> None:
        self.callbacks.fire("on_train_end")
        summary = {
            **self.state.summary,
            "steps": self.state.step,
            "num_tokens": self.state.num_tokens,
            "skipped_steps": self.state.skipped_steps,
            "skipped_prompts": len(self.state.too_long),
            "seconds": self._seconds(),
            "model": str(self._last_saved / MODEL_FOLDER) if self._last_saved else None,
        }
        self.recorder.finish(summary)

    def _evaluate(self) -> dict[str, float]:
        self.engine.wake()
        state = self._trainer_state()
        metrics, _ = evaluate(self.eval_prompts, self.engine, self.rewards, self.config, state, self.ranks)
        self.engine.sleep()
        return metrics

    # ------------------------------------------------------------------------------------------- checkpoint and resume

    def _mark_boundary(self) -> None:
        """Remember where a checkpoint would go on from: what follows may be cut short and done again."""
        self.state.summary["seconds"] = self._seconds()
        self._boundary = (copy.deepcopy(self.state), rng_state())

    def _save(self) -> None:
        """Write a checkpoint of the last boundary."""
        self.state, rng = copy.deepcopy(self._boundary[0]), self._boundary[1]
        if self._last_saved_step == self.state.step:
            return
        self.recorder.sync()
        files = self.directory.parts
        parts = self.ranks.together("their parts", lambda: write_part(files, updater=self.updater, rng=rng))

        def write(folder: Path) -> None:
            write_snapshot(
                folder, updater=self.updater, state=self.state, parts=parts, files=files, pending=self.pending
            )

        self._last_saved = self.ranks.from_first("checkpoint", lambda: self.store.save(self.state.step, write))
        self._last_saved_step = self.state.step

    def _open(self, resume: str) -> bool:
        """Everything between the call of `train` and the first step. Returns whether there is anything left to do."""
        config = self.config
        options = self.task.options() | config.to_dict()
        afresh, checkpoint, changed = self.directory.enter(options, resume, config, self.ranks)
        if checkpoint is None:
            self._begin_anew()
        elif self._finished(checkpoint):
            return False
        self._load_everywhere(self._where_to_load(checkpoint), train=True)
        self.ranks.same("numbers of rows in train_dataset", lambda: len(self.source))
        self.ranks.from_first("claim", lambda: self.directory.claim(options, afresh=afresh))
        self.optimizer = Optimizer(self.policy.trainable(), config, self.ranks)
        if config.needs_reference and self.reference is None:
            self.reference = Reference(self.policy)
        if config.has_critic:
            self.critic = self.critic or make_critic(self.policy, config, self.task.peft_config)
            self.ranks.make_alike(self.critic.body)
            self.critic_optimizer = Optimizer(self.critic.trainable(), config, self.ranks)
        if config.sync_ref_model and self.policy.is_peft:
            raise ConfigError("sync_ref_model excludes adapters: there the reference is the model without them")
        self.collector = Collector(self.source, self.engine, self.rewards, config, self.ranks)
        self.updater = Updater(
            self.policy, self.reference, self.optimizer, config, self.critic, self.critic_optimizer, self.ranks
        )
        self.callbacks = Callbacks(self._callback_list, config, self.policy, self.optimizer.torch_optimizer, self.ranks)
        batches = math.ceil(config.num_train_epochs * len(self.source) / config.num_prompts_per_step)
        self.total_steps = config.max_steps if config.max_steps > 0 else batches * config.steps_per_batch
        seed_generators(derive_seed(config.seed, "process", self.ranks.rank) if self.ranks.rank else config.seed)
        if checkpoint is not None:
            self.state, self.pending = read_snapshot(checkpoint, updater=self.updater, source=self.source)
            self.source.too_long = self.state.too_long
            self.engine.sync(self.policy)
        self._last_saved, self._last_saved_step = checkpoint, self.state.step if checkpoint else None
        self._seconds_before = self.state.summary.get("seconds", 0.0)
        self._trained = True
        self.ranks.from_first(
            "recorder", lambda: self._begin_recording(options, -1 if checkpoint is None else self.state.step)
        )
        if not self.ranks.first:
            self.recorder = SilentRecorder(config, self.policy.device)
        going_on = [] if checkpoint is None else [f"going on from {checkpoint}{changed}"]
        for note in (*going_on, self._engine_choice, *self.updater.notes()):
            self.recorder.message(note)
        self._mark_boundary()
        return True

    def _begin_recording(self, options: dict[str, Any], step: int) -> None:
        """Drop what was written after the checkpoint of `step`, -1 without one, and write on from there."""
        self.store = CheckpointStore(self.directory.path, self.config.save_total_limit)
        self.store.drop_after(step)
        self.directory.cut_after(step)
        self.recorder = Recorder(
            self.directory, self.config, options, self.policy.device, self.state.step, self.total_steps
        )

    def _finished(self, checkpoint: Path) -> bool:
        """Is the checkpoint the run's last, and its summary written? Told without loading anything."""
        state = TrainState(**load_json(checkpoint / "state.json")["state"])
        if not (0 < self.config.max_steps <= state.step and self.directory.summary.exists()):
            return False
        self.state = state
        return True

    def _begin_anew(self) -> None:
        """Forget an earlier `train` of this object; its model is loaded again where that is possible."""
        self.state, self.pending, self.reference, self.critic = TrainState(), None, None, None
        if self._trained and not isinstance(self.task.model, str):
            raise ConfigError("the model handed over has been trained already: make a new trainer to begin anew")
        self._loaded = self._loaded and not self._trained

    def _where_to_load(self, checkpoint: Path | None) -> Any:
        """The checkpoint's model folder; a reference or base model needs the initial one, a factory may do more."""
        model = self.task.model
        enough = not self.config.needs_reference and not self.config.use_peft and self.task.peft_config is None
        plain = isinstance(model, str) and not is_factory(model)
        return str(checkpoint / MODEL_FOLDER) if checkpoint and enough and plain else model

    def _load_everywhere(self, model: Any, *, train: bool) -> None:
        """In all processes, with the first one's weights: a factory may not give the same ones everywhere."""
        self.ranks.together("data, model and engine", lambda: self._load(model, train=train))
        self.ranks.make_alike(self.policy)

    def _load(self, model: Any, *, train: bool) -> None:
        """Data first, it is the cheapest to find fault with; then the model, once, the prompts and the engine."""
        config = self.config
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        train_rows = self.task.train_rows(config) if train else None
        eval_rows = self.task.eval_rows(config)
        if not self._loaded:
            seed_generators(self.config.seed)
            self.policy = load_policy(model, self.task.processing_class, config, self.task.peft_config)
            self._loaded = True
        if train_rows is not None:
            self.source = make_prompts(train_rows, self.policy, config, config.max_completion_length)
        if eval_rows is not None:
            longest = config.eval_max_completion_length or config.max_completion_length
            held_out = make_prompts(eval_rows, self.policy, config, longest)
            self.eval_prompts = list(held_out.usable(config.eval_max_prompts))
        if wrong := [t for t in config.stop_token_ids if not 0 <= t < self.policy.vocab_size]:
            raise ConfigError(f"stop_token_ids={wrong} are outside the vocabulary of {self.policy.vocab_size}")
        if not hasattr(self, "engine"):  # it may take a minute and half of the GPU: one serves both data sets
            self.engine, self._engine_choice = make_engine(config, self.policy, self.ranks.rank, self.ranks.size)

    # ------------------------------------------------------------------------------------------------- small matters

    def _trainer_state(self) -> Any:
        if not hasattr(self, "callbacks"):
            return None
        return self.callbacks.at(self.state.step, self.total_steps, self.state.num_tokens)

    def _seconds(self) -> float:
        return round(self._seconds_before + time.perf_counter() - self.started, 3)
