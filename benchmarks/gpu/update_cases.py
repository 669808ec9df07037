"""The update's inputs: models of Qwen2.5's shapes with random weights, rollouts of given lengths, true gradients, TRL.

TRL is 1.16's own GRPOTrainer on the same weights and tokens: its `_prepare_inputs` pads, splits and computes the
advantages, its `compute_loss` and the backward are what is timed. Only its sampling is replaced.
"""

from __future__ import annotations

import importlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.small_model import Shape, lognormal_lengths, make_rollouts, make_tokenizer
from fastgrpo.config import GRPOConfig
from fastgrpo.optim import Optimizer
from fastgrpo.policy import load_policy
from fastgrpo.records import Rollout, RolloutBatch
from fastgrpo.update import Updater
from fastgrpo_kernels import group_advantages

SHAPES = (
    Shape("qwen2.5-0.5b", 151936, width=896, feed_forward=4864, layers=24, heads=14, kv_heads=2, head_dim=64),
    Shape("qwen2.5-1.5b", 151936, width=1536, feed_forward=8960, layers=28, heads=12, kv_heads=2, head_dim=128),
)
_TINY = Shape("tiny", 520, width=64, feed_forward=128, layers=2, heads=4, kv_heads=2, head_dim=16)
_SIGMA = 0.6
"""Of the logarithms of the completions' lengths."""


@dataclass(frozen=True)
class Workload:
    """`prompts` groups of `n`: prompts of lengths from the first to the second, completions lognormal up to a cap."""

    name: str
    prompts: int
    n: int
    prompt: tuple[int, int]
    median: float
    longest: int

    @property
    def count(self) -> int:
        return self.prompts * self.n


def shapes(bench: Bench) -> tuple[Shape, Shape]:
    return (_TINY, _TINY) if bench.small else SHAPES


def gsm8k(bench: Bench, prompts: int) -> Workload:
    """Prompts of about 100 tokens, completions of 150 on average."""
    if bench.small:
        return Workload("gsm8k", 4, 4, (6, 10), 8, 16)
    return Workload("gsm8k", prompts, 8, (60, 140), 125, 512)


def long_prompts(bench: Bench, prompts: int) -> Workload:
    """Completions of 256 on average."""
    if bench.small:
        return Workload("prompt1024", 2, 4, (40, 40), 8, 16)
    return Workload("prompt1024", prompts, 16, (1024, 1024), 214, 512)


def rollouts(shape: Shape, work: Workload, dead: int = 0, seed: int = 0) -> list[Rollout]:
    """On-policy; rewards of 0 and 1, in the first `dead` groups all the same: those have no advantage."""
    rng = random.Random(seed)
    lengths = rng.sample(lognormal_lengths(work.count, work.median, _SIGMA, work.longest), work.count)
    groups = [lengths[i : i + work.n] for i in range(0, work.count, work.n)]
    low, high = work.prompt
    widths = [low + (high - low) * i // max(work.prompts - 1, 1) for i in range(work.prompts)]
    made = make_rollouts(shape, widths, groups, seed)
    for i, r in enumerate(made):
        r.reward = float(r.group >= dead and i % work.n <= r.group % (work.n - 1))
    rewards, index = torch.tensor([r.reward for r in made]), torch.tensor([r.group for r in made])
    for r, advantage in zip(made, group_advantages(rewards, index).tolist(), strict=True):
        r.advantage = advantage
    return made


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Qwen2 of this shape with transformers' sdpa; for every dtype the same weights, but for their rounding."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.2 if shape is _TINY else 0.02,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not the buffers: RoPE's frequencies stay in fp32
    return model


def dtype_of(bench: Bench) -> torch.dtype:
    return torch.bfloat16 if bench.device.type == "cuda" else torch.float32


def make_updater(bench: Bench, shape: Shape, work: Workload, **options: Any) -> Updater:
    """As the trainer makes it: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    config = GRPOConfig(
        device="cuda:0" if bench.device.type == "cuda" else "cpu",
        num_prompts_per_step=work.prompts,
        num_generations=work.n,
        max_prompt_length=work.prompt[1],
        max_completion_length=work.longest,
        **options,
    )
    model = make_model(shape, bench.device, dtype_of(bench))
    policy = load_policy(model, _tokenizer(), config)
    return Updater(policy, None, Optimizer(policy.trainable(), config), config)


def _tokenizer() -> Any:
    """Of fewer tokens than any model here: nothing is decoded."""
    return make_tokenizer(replace(_TINY, vocabulary=64), eos_token="1", pad_token="0")


def step(updater: Updater, chosen: list[Rollout]) -> dict[str, float]:
    """The trainer's step, at a learning rate of 0: the weights stay as they are."""
    metrics, applied = updater.step(RolloutBatch(chosen, {}), 0.0)
    if not applied:
        raise ValueError(f"a step with a gradient of norm {metrics['grad_norm']}")
    return metrics


def step_gradients(updater: Updater, chosen: list[Rollout]) -> list[Tensor]:
    """What a step is about to apply, in the order of the model's parameters; `max_grad_norm` must be 0."""
    found: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        found.update((n, p.grad.clone()) for n, p in zip(updater.optimizer.names, masters, strict=True))

    hook = updater.optimizer.torch_optimizer.register_step_pre_hook(keep)
    step(updater, chosen)
    hook.remove()
    return [found[name] for name, _ in updater.policy.trainable()]


def plain_gradients(model: Any, chosen: Sequence[Rollout], sums: torch.dtype) -> list[Tensor]:
    """Dapo's gradient of what trains, each sequence alone through transformers' forward, summed in `sums`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p, dtype=sums) for p in parameters]
    for r in chosen:
        ids = torch.tensor([[*r.prompt.token_ids, *r.token_ids]], device=parameters[0].device)
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -r.num_tokens - 1 : -1]
        logits = model.lm_head(states).to(torch.promote_types(states.dtype, torch.float32))
        logprob = torch.log_softmax(logits, -1).gather(1, ids[0, -r.num_tokens :, None])
        (-r.advantage * logprob.sum()).backward()  # on-policy, where the ratio is 1 and is not clipped
        for total, p in zip(totals, parameters, strict=True):
            total += p.grad
            p.grad = None
    scale = 1 / sum(r.num_tokens for r in chosen)
    return [total.mul_(scale) for total in totals]


def gradient_error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm, all parameters together."""
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, true, strict=True))
    whole = sum(float(b.double().square().sum()) for b in true)
    return float((wrong / whole) ** 0.5)


@contextmanager
def liger_layers(model: Any) -> Iterator[None]:
    """liger-kernel's norm, RoPE and SwiGLU in this model; what it changes for all of transformers is put back."""
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    if model.device.type != "cuda":
        raise ImportError("liger_kernel needs a GPU")
    package: Any = importlib.import_module("liger_kernel.transformers")
    names = ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP")
    with mock.patch.multiple(qwen2, **{name: getattr(qwen2, name) for name in names}):
        package.apply_liger_kernel_to_qwen2(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
        )
        yield


def _reward(score: list[float], **_: Any) -> list[float]:
    return score


class Trl:
    """A GRPOTrainer with bf16 weights (fp32 on a CPU), no gradient checkpointing, its chunked LM head, on-policy dapo.

    Its attention is flash-attn's where that is installed, else sdpa.
    """

    def __init__(self, bench: Bench, shape: Shape, work: Workload) -> None:
        from datasets import Dataset

        package: Any = importlib.import_module("trl")
        on_gpu = bench.device.type == "cuda"
        config = package.GRPOConfig(
            output_dir=str(Path(tempfile.gettempdir()) / "fastgrpo-gpu-suite-trl"),
            use_cpu=not on_gpu,
            bf16=on_gpu,
            report_to=[],
            loss_type="dapo",
            num_generations=work.n,
            max_completion_length=work.longest,
            per_device_train_batch_size=work.count,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
        )
        self.model = make_model(shape, bench.device, dtype_of(bench))
        self.attention = "flash_attention_2" if on_gpu and find_spec("flash_attn") else "sdpa"
        self.model.set_attn_implementation(self.attention)
        data = Dataset.from_dict({"prompt": ["0"], "score": [0.0]})
        self.trainer = package.GRPOTrainer(self.model, _reward, config, data, processing_class=_tokenizer())
        self.trainer.model.train()

    def micro_batches(self, chosen: list[Rollout], size: int) -> list[dict[str, Any]]:
        """What TRL makes of the rollouts, `size` sequences in each."""
        trainer = self.trainer
        count = len(chosen) // size
        trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = count
        trainer.current_gradient_accumulation_steps, trainer._buffered_inputs = count, None

        def generate(_: list[Any]) -> tuple[Any, ...]:
            prompts, completions = [r.prompt.token_ids for r in chosen], [r.token_ids for r in chosen]
            return prompts, completions, None, [""] * len(chosen), None, {}, None, None

        rows = [{"prompt": "0", "score": r.reward} for r in chosen]
        made = []
        with mock.patch.object(trainer, "_generate", generate):
            for number in range(count):
                trainer._step = number
                made.append(dict(trainer._prepare_inputs(rows)))
        return made

    def backward(self, batches: Sequence[dict[str, Any]]) -> None:
        """Gradients add up in the model; dapo's denominator is the whole batch's."""
        for batch in batches:
            self.trainer.compute_loss(self.model, batch).backward()
