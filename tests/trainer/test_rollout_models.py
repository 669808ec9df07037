"""The loop engine on models of several families: exact where it decodes itself, and a reason where it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

from fastgrpo.policy.attention import register
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine
from fastgrpo.rollout.loop import engine as loop_engine

_SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_PROMPTS = [Prompt(i, "", [(7 * i + j * j) % 90 for j in range(n)]) for i, n in enumerate((3, 17, 1, 30))]


def _model(config: Any, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()
    model.set_attn_implementation(attention or register())
    return model


def _generate(model: Any, tokenizer: Any, sampling: Sampling, batch_size: int = 7) -> tuple[LoopEngine, list[Rollout]]:
    engine = LoopEngine(model, tokenizer, batch_size=batch_size)
    return engine, engine.generate(_PROMPTS, 4, sampling)


@torch.no_grad()
def _logprob(model: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """By the full forward of its sequence alone."""
    ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, -rollout.num_tokens - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, -rollout.num_tokens :, None]).squeeze(1)


def _error(model: Any, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """Largest difference of a log-prob from the full forward's."""
    return max((r.sampling_logprob - _logprob(model, r, temperature)).abs().max().item() for r in rollouts)


_WINDOWED = ["sliding_attention", "full_attention"] * 2
_DECODED: dict[str, Any] = {
    "llama": tf.LlamaConfig(**_SIZES),
    "one-key-head": tf.LlamaConfig(**_SIZES | {"num_key_value_heads": 1}),
    "as-many-key-heads": tf.LlamaConfig(**_SIZES | {"num_key_value_heads": 4}),
    "qwen2-windows": tf.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=2, layer_types=_WINDOWED
    ),
    "qwen3": tf.Qwen3Config(**_SIZES, head_dim=16),
    "mistral-window": tf.MistralConfig(**_SIZES, sliding_window=6),
    "gemma2": tf.Gemma2Config(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        layer_types=_WINDOWED,
    ),
    "gemma3": tf.Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=5, layer_types=_WINDOWED),
    "mixtral": tf.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("name", _DECODED)
def test_exact_over_its_own_cache(name: str, slots: bool, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beyond the windows, and where a prompt lies outside the window of some of its readers."""
    if slots:
        monkeypatch.setattr(loop_engine, "why_not_slots", lambda shape: None)
    model = _model(_DECODED[name])
    engine, rollouts = _generate(model, tiny_tokenizer, Sampling(24, 0.9, seed=1, stop_token_ids=(11, 12, 13)))
    assert engine.reason is None
    assert slots == (engine.unslotted is None)
    assert len({r.num_tokens for r in rollouts}) > 3
    assert _error(model, rollouts, 0.9) < 1e-5


def test_half_precision_is_as_near_as_the_models_own(tiny_tokenizer: Any) -> None:
    """Root mean square against fp32 arithmetic on the same weights."""
    model = _model(_DECODED["qwen3"], dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    engine, rollouts = _generate(model, tiny_tokenizer, Sampling(12, seed=1))
    assert engine.reason is None
    true, own = (torch.cat([_logprob(m, r) for r in rollouts]) for m in (exact, model))
    reported = torch.cat([r.sampling_logprob for r in rollouts])
    assert (reported - true).square().mean() <= 1.5**2 * (own - true).square().mean()


_REFUSED: dict[str, tuple[Any, str]] = {
    "deepseek": (
        tf.DeepseekV3Config(
            **_SIZES | {"num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=4,
        ),
        "several sizes",
    ),
    "gpt-neo": (
        tf.GPTNeoConfig(
            vocab_size=90, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], window_size=8
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_other_models_run_over_transformers_cache(name: str, tiny_tokenizer: Any) -> None:
    config, reason = _REFUSED[name]
    model = _model(config, "eager" if name != "deepseek" else None)
    engine, rollouts = _generate(model, tiny_tokenizer, Sampling(8, seed=1, stop_token_ids=(11, 12, 13)))
    assert engine.reason is not None
    assert reason in engine.reason
    assert _error(model, rollouts[8:12]) < 1e-5  # a group of one-token prompts needs no padding


@pytest.mark.parametrize(
    "config",
    [
        tf.MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, state_size=8),
        tf.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"] * 2),
    ],
    ids=["mamba", "lfm2"],
)
def test_models_whose_cache_cannot_be_repeated_are_an_error(config: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"the loop engine cannot decode (Mamba|Lfm2)ForCausalLM"):
        _generate(_model(config, "eager"), tiny_tokenizer, Sampling(2))


def test_another_attention_is_named(tiny_tokenizer: Any) -> None:
    model = _model(_DECODED["llama"], "sdpa")
    engine, rollouts = _generate(model, tiny_tokenizer, Sampling(6, seed=1))
    assert engine.reason is not None
    assert "sdpa" in engine.reason
    assert _error(model, rollouts) < 1e-5


def test_windows_that_attention_is_not_told_of(tiny_tokenizer: Any) -> None:
    """A few tokens would not show them; the config does."""
    model = _model(_DECODED["llama"])
    model.config.layer_types, model.config.sliding_window = _WINDOWED, 9
    engine, _ = _generate(model, tiny_tokenizer, Sampling(2))
    assert engine.reason is not None
    assert "masks alone" in engine.reason


def test_a_model_whose_cached_logits_differ_is_refused(tiny_tokenizer: Any) -> None:
    """Attention with a bias that it does not hand on: only the comparison can tell."""
    model = _model(_DECODED["llama"])

    def bend(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return (output[0] * 1.1, output[1]) if kwargs.get("attend") is not None else output

    model.model.layers[1].self_attn.register_forward_hook(bend, with_kwargs=True)
    engine, rollouts = _generate(model, tiny_tokenizer, Sampling(6, seed=1))
    assert engine.reason is not None
    assert "differ from a full forward's" in engine.reason
    assert _error(model, rollouts) < 1e-5


def test_adapters_take_part(tiny_tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_model(_DECODED["qwen3"]), peft.LoraConfig(r=4, init_lora_weights=False))
    engine, rollouts = _generate(model, tiny_tokenizer, Sampling(10, seed=1))
    assert engine.reason is None
    assert _error(model, rollouts) < 1e-5
    with model.disable_adapter():
        assert _error(model, rollouts) > 1e-2
