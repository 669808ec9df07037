"""A real TRL trainer on a tiny model, with everything real but the sampling of completions.

`_generate` returns fixed tokens; what TRL makes of them (padding, masks, old, reference and sampling log-probabilities,
importance ratios, rewards, advantages, the split into micro-batches) is its own doing. The weights then move a little,
so that every ratio differs from 1.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig

VOCABULARY, PAD, EOS = 37, 0, 2
TEMPERATURE = 0.8
COMPLETION_LENGTHS = [6, 9, 1, 4, 9, 3, 7, 2]
TRUNCATED = (1, 4)
"""Completions that do not end with EOS."""

_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {},
    "RecurrentGemma": {"logits_soft_cap": 0.3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8},
    "Qwen3Moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 0.1,
        "output_router_logits": True,
    },
}


def make_model(family: str = "Qwen3", tie: bool = False) -> Any:
    """A model of width 32 with two layers, in fp32; Phi's LM head has a bias."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "initializer_range": 0.2,
        "tie_word_embeddings": tie,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options | _CONFIGS[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the form t<i>."""
    words = {"<pad>": PAD, "<bos>": 1, "<eos>": EOS} | {f"t{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="t3"
    )


def _reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 11) for ids in completion_ids]


def make_trainer(kind: Any, folder: Path, family: str = "Qwen3", model: Any = None, **options: Any) -> Any:
    """A trainer of the class `kind`: micro-batches of 4, 2 of them per optimizer step, two steps per generation."""
    if model is None:
        model = make_model(family)
        if options.get("beta"):
            # TRL loads the reference model from where the config says that the model came from.
            model.save_pretrained(folder / family)
            model.config._name_or_path = str(folder / family)
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "num_generations": 4,
        "max_completion_length": 9,
        "temperature": TEMPERATURE,
        "gradient_checkpointing": False,
    }
    with warnings.catch_warnings(), mock.patch("trl.trainer.grpo_trainer.VLLMGeneration"):
        warnings.simplefilter("ignore", FutureWarning)
        trainer = kind(
            model,
            _reward,
            GRPOConfig(**defaults | options),
            Dataset.from_dict({"prompt": ["t5 t6"] * 4}),
            processing_class=make_tokenizer(),
        )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def micro_batches(trainer: Any, tools: bool = False) -> list[dict[str, Tensor]]:
    """Two micro-batches of 4 completions as TRL prepares them from fixed tokens; then the weights move."""
    generator = torch.Generator().manual_seed(3)
    prompts, completions, logprobs, tool_masks = [], [], [], []
    for i, length in enumerate(COMPLETION_LENGTHS):
        prompts.append(torch.randint(3, VOCABULARY, (3 + i % 3,), generator=generator).tolist())
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        if i not in TRUNCATED:
            tokens[-1] = EOS
        completions.append(tokens.tolist())
        logprobs.append(_sampled_logprob(trainer.model, prompts[-1], completions[-1], generator))
        tool_masks.append([int(j % 3 != 1) for j in range(length)])
    logprobs[0][2] = None  # the engine reported none
    texts = [" ".join(map(str, c)) for c in completions]

    def generate(_: list[Any]) -> tuple[Any, ...]:
        return prompts, completions, tool_masks if tools else None, texts, logprobs, {}, None, None

    rows = [{"prompt": "t5"} for _ in COMPLETION_LENGTHS]
    with mock.patch.object(trainer, "_generate", generate):
        batches = []
        for trainer._step in range(2):
            batches.append(dict(trainer._prepare_inputs(rows)))
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    if not trainer.use_vllm:
        for batch in batches:
            del batch["sampling_per_token_logps"]  # only vLLM reports them
    return batches


@torch.no_grad()
def _sampled_logprob(model: Any, prompt: list[int], completion: list[int], generator: torch.Generator) -> list[Any]:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    logprob = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    return (logprob + 0.2 * torch.randn(logprob.shape, generator=generator)).tolist()


def gradients(trainer: Any, losses: list[Tensor]) -> dict[str, Tensor]:
    """Of the sum of the losses, by every trainable parameter's name; 0 where there is none."""
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(torch.stack(losses).sum(), list(named.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest entry of `a`."""
    largest = max(x.abs().max().item() for x in a.values())
    return max((a[name] - b[name]).abs().max().item() for name in a) / largest
