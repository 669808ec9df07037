"""transformers' continuous batching: paged attention over the training model itself, so there is nothing to sync.

Requests are scheduled token by token and a group's prompt is prefilled once, then forked. A prompt enters when a whole
group has room beside what is being decoded, so that the cache has a fixed size whatever the number of prompts. With
flash attention on a GPU the batches run as CUDA graphs, prepared while the one before computes; cache and graphs are
kept between two calls. Without flash attention a step costs rows x rows: `sdpa` there masks every row's keys for every
row, which is right but slow. Not done here: several GPUs for one model, a cache on the host, stopping at strings.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastgrpo.errors import RunError
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import end_tokens_of
from fastgrpo.rollout.stopping import Stopping

# Tokens of a page: what flash attention's block tables ask for; and small ones where nothing asks, to waste less.
_FLASH_PAGE, _PAGE = 256, 32
# Without flash attention: rows of a step, its tokens at most. Its mask has tokens x (cache + tokens) numbers.
_ROWS, _TOKENS = 32, 256
# A generation thread that still runs so long after it was told to stop is given up.
_STOP_SECONDS = 10.0
# The first version with all that is used here; its managers can be paused.
OLDEST = "5.23"
# Largest difference of a log-prob from a full forward's in the check at the start; 16 bits round each in their own way.
_TOLERANCE = {torch.float16: 0.2, torch.bfloat16: 0.5}


class TransformersEngine:
    """Generates with a transformers model in this process, by its continuous batching.

    model:      a causal (or PEFT) model; put into eval() and another attention while it generates, and back.
    tokenizer:  decodes, and names the end-of-sequence token.
    batch_size: completions decoded at once, at most (32 without flash attention); a group larger than that still goes
                together. The cache holds this many of the longest prompt and completion seen.
    timeout:    seconds that one `generate` may take.
    attention:  transformers' name of the attention to generate with; None = flash attention 3 or 2 where it is there
                (16-bit weights on a GPU), else "sdpa".
    keep_asleep: keep cache and CUDA graphs when asleep: preparing them again takes seconds on a GPU.
    options:    more fields of transformers' `ContinuousBatchingConfig`, e.g. {"use_async_batching": False}.

    The same seed, prompts, weights and batch_size give the same tokens where the device's matrix products repeat.
    Raises ValueError for a model that continuous batching cannot run, which it tries on a few tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 256,
        timeout: float = 3600.0,
        attention: str | None = None,
        keep_asleep: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or timeout <= 0:
            raise ValueError(f"batch_size={batch_size} and timeout={timeout} must be positive")
        self.version = 0
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.timeout = timeout
        self.keep_asleep = keep_asleep
        self.end_tokens = end_tokens_of(model, tokenizer)
        self._causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._session: _Session | None = None
        self._hung = False
        reason = _why_never(model, self._causal_lm)
        self._attention = attention or ("sdpa" if reason else best_attention(self._causal_lm))
        self._flash = "flash" in self._attention
        if reason is None and self._attention == "sdpa" and not self._causal_lm._supports_sdpa:
            reason = "its attention is not one of sdpa, and flash attention is not there (or its weights not 16-bit)"
        if reason is None:
            self._options = {"use_cuda_graph": False, "use_async_batching": False}
            reason = self._why_not()
            self._options = dict(options or {})
        if reason is not None:
            raise ValueError(f"rollout_engine 'transformers' cannot run {type(self._causal_lm).__name__}: {reason}")

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Sampling, done: Callable[[list[Rollout]], None] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`. `done` must not draw from torch's own generators: the samples come from there."""
        if self._hung:
            raise RunError("transformers' generation thread still hangs in an earlier rollout: start the run again")
        if not prompts:
            return []
        stopping = Stopping(self.tokenizer, self.end_tokens | set(sampling.stop_token_ids), sampling.stop_strings)
        groups: dict[int, list[Rollout]] = {}

        def ended(i: int, outputs: list[Any]) -> None:
            groups[i] = self._rollouts(prompts[i], i, outputs, sampling, stopping)
            if done is not None:
                done(groups[i])

        with self._generating():
            rows = self.batch_size if self._flash else min(self.batch_size, _ROWS)
            plan = _Plan.of(prompts, n, sampling, max(n, rows))
            session = self._open(plan)
            torch.manual_seed(sampling.seed ^ sampling.first_group)  # captured graphs and caches know no seed
            try:
                requests = _Requests([p.token_ids for p in prompts], n, plan.rows, sampling.max_tokens, stopping.tokens)
                session.run(requests, self.timeout, ended)
            except BaseException:
                self._session = None
                self._hung = not session.abort()
                raise
        return [rollout for i in range(len(prompts)) for rollout in groups[i]]

    def sync(self, policy: Any) -> None:
        """The weights are the policy's own; keys and values are never kept from one `generate` to the next."""
        self.version += 1

    def sleep(self) -> None:
        """Free cache and CUDA graphs, unless `keep_asleep`."""
        if not self.keep_asleep:
            self.close()

    def wake(self) -> None:
        """Memory is taken by `generate`."""

    def close(self) -> None:
        """Free cache and CUDA graphs; a later `generate` makes them again."""
        if self._session is not None:
            self._session.manager.destroy()
            self._session = None
            torch.cuda.empty_cache()

    def _open(self, plan: _Plan) -> _Session:
        """The session at hand where it fits, else a new one."""
        if self._session is not None:
            # Lengths creep up from one batch to the next: never shrink, or every batch would prepare anew.
            old = self._session.plan
            plan = replace(plan, rows=max(plan.rows, old.rows), longest=max(plan.longest, old.longest))
        if self._session is None or plan != self._session.plan:
            self.close()
            self._session = _Session(self._causal_lm, plan, self._config(plan))
        return self._session

    def _config(self, plan: _Plan) -> Any:
        """`ContinuousBatchingConfig`: a cache for `plan.rows` sequences of `plan.longest` tokens.

        CUDA graphs and asynchronous batches are left to transformers, which has them with flash attention on a GPU.
        """
        from transformers import ContinuousBatchingConfig

        page = _FLASH_PAGE if self._flash else _PAGE
        pages = -(-plan.longest // page)
        # Full and sliding layers take memory in sectors that suit both: room for the ones that are begun.
        spare = self._causal_lm.config.get_text_config().num_hidden_layers // 2
        options: dict[str, Any] = {
            "page_size": page,
            "num_blocks": plan.rows * pages + spare,
            "max_requests_per_batch": plan.rows,
            "max_batch_tokens": max(8192 if self._flash else _TOKENS, plan.rows),
            "return_logprobs": True,
            "auto_switch_to_flash": False,  # done here already
            "drop_unsupported_processors": False,  # a filter left out would be another distribution
            "safety_margin": 0.0,  # `Feed` lets in no more than the cache holds
            "max_blocks_per_request": None if self._flash else 0,  # None: as many as the longest needs
            "seed": 0,  # transformers would draw one; ours is set for every `generate`
        }
        return ContinuousBatchingConfig(**options | self._options)

    @torch.no_grad()
    def _why_not(self) -> str | None:
        """Why this model cannot be run, found by running it: a few tokens, whose log-probs a full forward must give."""
        log = logging.getLogger("ContinuousBatchingLogger")  # prints a traceback before what is raised here says it
        log.disabled = True
        ids = [i % self._causal_lm.config.get_text_config().vocab_size for i in range(3, 12)]
        try:
            [rollout, _] = self.generate([Prompt(0, "", ids)], 2, Sampling(4))
        except (RunError, ValueError, RuntimeError, ImportError, TypeError, AttributeError) as error:
            return " ".join(str(error).split()) or type(error).__name__
        finally:
            log.disabled = False
            self.close()
        tokens, was_training = torch.tensor(ids + rollout.token_ids, device=self._causal_lm.device), self.model.training
        self.model.eval()
        logits = self._causal_lm(input_ids=tokens[None], use_cache=False).logits[0, len(ids) - 1 : -1]
        self.model.train(was_training)
        expected = logits.float().log_softmax(-1).gather(1, tokens[len(ids) :, None]).squeeze(1).cpu()
        difference = (expected - rollout.sampling_logprob).abs().max().item()
        if not difference <= _TOLERANCE.get(self._causal_lm.dtype, 1e-3):
            return f"its log-probs over paged {self._attention} are {difference:.1e} off those of a full forward"
        return None

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """eval(), the attention of continuous batching and a random state of its own; everything as before after it."""
        attention = self._causal_lm.config._attn_implementation
        device = self._causal_lm.device
        was_training = self.model.training
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self.model.eval()
            try:
                self._causal_lm.set_attn_implementation(self._attention)
                yield
            finally:
                self._causal_lm.set_attn_implementation(attention)
                self.model.train(was_training)

    def _rollouts(
        self, prompt: Prompt, group: int, outputs: list[Any], sampling: Sampling, stopping: Stopping
    ) -> list[Rollout]:
        ends = [stopping.end_of(o.generated_tokens) for o in outputs]  # behind a stop string sampling went on
        tokens = [o.generated_tokens[:end] for o, end in zip(outputs, ends, strict=True)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        # The likeliest token is certain where nothing else can be drawn.
        logprobs = [torch.tensor(o.logprobs, dtype=torch.float32) * (sampling.temperature > 0) for o in outputs]
        return [
            Rollout(prompt, group, ids, logprob[: len(ids)], end is not None, text, self.version)
            for ids, logprob, end, text in zip(tokens, logprobs, ends, texts, strict=True)
        ]


def best_attention(causal_lm: Any) -> str:
    """The fastest attention that continuous batching has for this model here, by transformers' name."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    half = causal_lm.dtype in (torch.float16, torch.bfloat16)
    if causal_lm.device.type != "cuda" or not half or not causal_lm._supports_flash_attn:
        return "sdpa"
    hopper = torch.cuda.get_device_capability(causal_lm.device)[0] == 9
    if hopper and is_flash_attn_3_available(kernels_fallback_ok=True):
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available(kernels_fallback_ok=True) else "sdpa"


@dataclass(frozen=True)
class _Plan:
    """What a session is made for: rows at once, the longest of them in tokens, and how tokens are drawn."""

    rows: int
    longest: int
    drawing: tuple[float, int, float, float]

    @classmethod
    def of(cls, prompts: list[Prompt], n: int, s: Sampling, rows: int) -> _Plan:
        longest = max(len(p.token_ids) for p in prompts) + s.max_tokens
        return cls(min(rows, n * len(prompts)), longest, (s.temperature, s.top_k, s.top_p, s.min_p))


@dataclass(frozen=True)
class _Requests:
    """What one `generate` asks for: `n` completions of every prompt, up to `rows` of them decoded at once."""

    prompts: list[list[int]]
    n: int
    rows: int
    max_tokens: int
    ends: set[int]

    def names(self, i: int) -> list[str]:
        """The requests of prompt i: the prompt's own and its forks, by transformers' naming."""
        if self.forks(i):
            return [str(i), *(f"{i}__child#{k}" for k in range(self.n - 1))]
        return [f"{i}_{k}" for k in range(self.n)]

    def forks(self, i: int) -> bool:
        """A fork happens before a prompt's last token: a prompt of one token has nothing to fork from."""
        return len(self.prompts[i]) > 1


class _Session:
    """A manager of transformers with its cache and CUDA graphs; its thread runs inside `run` alone."""

    def __init__(self, causal_lm: Any, plan: _Plan, config: Any) -> None:
        from transformers import GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self.plan = plan
        self.causal_lm = causal_lm
        temperature, top_k, top_p, min_p = plan.drawing
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p or None}
        generation = GenerationConfig(do_sample=temperature > 0, eos_token_id=-1, **drawing if temperature > 0 else {})
        self.manager = causal_lm.init_continuous_batching(
            generation_config=generation,
            continuous_batching_config=config,
            workload_hints=WorkloadHints(max_prompt_length=plan.longest, num_requests=plan.rows),
        )
        self.feed = _make_feed(self.manager)
        try:
            self.manager.warmup()
        except MemoryError as error:
            cache = f"{plan.rows} completions of {plan.longest} tokens"
            raise RunError(f"the cache of {cache} does not fit: lower the rollout's batch size ({error})") from error

    def run(self, requests: _Requests, timeout: float, ended: Callable[[int, list[Any]], None]) -> None:
        """Calls `ended` with each prompt's number and its n outputs, as they come. Raises RunError."""
        manager = self.manager
        # What was kept for prefixes is of older weights. The weights may still be on their way, on another stream.
        manager.batch_processor.cache.reset()
        if self.causal_lm.device.type == "cuda":
            torch.cuda.synchronize(self.causal_lm.device)
        deadline = time.monotonic() + timeout
        # A thread inherits being a daemon: one that hangs must not keep the process from ending.
        starter = threading.Thread(target=manager.start, daemon=True)
        starter.start()
        starter.join()
        with manager.pause():  # all that is there at first enters together, so that the schedule repeats
            self.feed.begin(requests)
        prompt_of = {name: i for i in range(len(requests.prompts)) for name in requests.names(i)}
        missing = [requests.n] * len(requests.prompts)
        outputs: dict[str, Any] = {}
        while len(outputs) < len(prompt_of):
            output = self._next(deadline, f"{len(prompt_of) - len(outputs)} completions missing after {timeout:g} s")
            outputs[output.request_id] = output
            i = prompt_of[output.request_id]
            missing[i] -= 1
            if missing[i] == 0:
                ended(i, [outputs[name] for name in requests.names(i)])
        manager.stop(timeout=_STOP_SECONDS, keep_for_next_session=True)
        # transformers keeps it on the model, where copies of the model would find it.
        del self.causal_lm._cached_continuous_batching_manager
        if manager.is_running():
            raise RunError("transformers' generation thread did not stop after the rollout")

    def _next(self, deadline: float, late: str) -> Any:
        """The next finished request; RunError, saying `late`, after the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            running = self.manager.is_running()
            output = self.manager.get_result(timeout=min(left, 1.0))
            if output is not None and output.error is None:
                return output
            if output is not None or not running:
                cause = self.manager.background_thread_status.fatal_error
                raise RunError(f"transformers' generation failed: {output.error if output else cause}") from cause
        raise RunError(f"generation takes too long: {late}")

    def abort(self) -> bool:
        """Stop without waiting for requests; False when the thread goes on all the same."""
        self.manager.stop(timeout=_STOP_SECONDS, hard_stop=True)
        return not self.manager.is_running()


def _make_feed(manager: Any) -> Any:
    """The manager's router of outputs, which also lets the next prompts in as completions end.

    It runs in the generation thread, between two steps: what is sampled does not hang on when this thread has its turn.
    """
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    class Feed(OutputRouter):
        def begin(self, requests: _Requests) -> None:
            """Let the first prompts in."""
            self.requests = requests
            self.waiting = deque(range(len(requests.prompts)))
            self.live = 0
            self._fill()

        def deliver_batch(self, outputs: list[Any]) -> None:
            super().deliver_batch(outputs)
            self.live -= len(outputs)
            self._fill()

        def _fill(self) -> None:
            requests = self.requests
            while self.waiting and self.live + requests.n <= requests.rows:
                i = self.waiting.popleft()
                self.live += requests.n
                manager.num_return_sequences = requests.n if requests.forks(i) else 1
                options = {"max_new_tokens": requests.max_tokens, "eos_token_id": sorted(requests.ends)}
                for name in requests.names(i)[:: manager.num_return_sequences]:
                    manager.add_request(requests.prompts[i], request_id=name, **options)

    manager.output_router = Feed()
    return manager.output_router


def _why_never(model: Any, causal_lm: Any) -> str | None:
    """Why continuous batching cannot run the model, as far as its class and config tell."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(OLDEST):
        return f"transformers {OLDEST} is needed, this is {transformers.__version__}"
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    if not hasattr(causal_lm, "init_continuous_batching") or not hasattr(causal_lm, "set_attn_implementation"):
        return "it has no continuous batching"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter is a prompt, which is not part of the model's layers"
    try:
        group_layers_by_attn_type(causal_lm.config.get_text_config())
    except (ValueError, AttributeError) as error:
        return f"not all its layers are full or sliding attention ({error})"
    return None
