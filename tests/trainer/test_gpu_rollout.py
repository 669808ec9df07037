"""The loop engine on a GPU: slots, captured steps, true log-probs, repeatable; a small training run, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from fastgrpo import GRPOConfig, GRPOTrainer
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine, burst

pytestmark = pytest.mark.gpu

_SIZES: dict[str, Any] = {
    "vocab_size": 105,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, Any] = {
    "qwen2": tf.Qwen2Config(**_SIZES),
    "qwen3": tf.Qwen3Config(**_SIZES, head_dim=64),
    "llama": tf.LlamaConfig(**_SIZES),
    "mistral-window": tf.MistralConfig(**_SIZES, sliding_window=40),
}
_TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3}
"""Mean difference of a log-prob; fp32's matrix products may be TF32's."""


def _policy(config: Any, tokenizer: Any, dtype: str) -> Policy:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return load_policy(model, tokenizer, GRPOConfig(device="cuda:0", dtype=dtype))  # type: ignore[arg-type]


def _prompts(*lengths: int) -> list[Prompt]:
    g = torch.Generator().manual_seed(1)
    return [Prompt(i, "", torch.randint(3, 105, (n,), generator=g).tolist()) for i, n in enumerate(lengths)]


def _difference(policy: Policy, rollouts: list[Rollout], temperature: float) -> float:
    away: list[torch.Tensor] = []
    for batch in policy.placed(pack(rollouts, max_tokens=4096, share=policy.shares)):
        assert batch.sampling_logprob is not None
        away.append((policy.logprobs(batch, temperature)[0] - batch.sampling_logprob).abs())
    return torch.cat(away).mean().item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", _FAMILIES)
def test_log_probs_are_the_training_forwards(name: str, dtype: str, tiny_tokenizer: Any) -> None:
    """More samples than slots, prompts of very different lengths; captured; the same bits again, from one session."""
    policy = _policy(_FAMILIES[name], tiny_tokenizer, dtype)
    prompts, sampling = _prompts(3, 300, 1, 64, 65, 7, 200, 31), Sampling(150, 0.9, seed=3, stop_token_ids=(5, 6))
    engine = LoopEngine(policy.model, policy.tokenizer, batch_size=24)
    rollouts = engine.generate(prompts, 8, sampling)
    assert (engine.reason, engine.unfused, engine.unslotted, engine.uncaptured) == (None,) * 4
    assert len({r.num_tokens for r in rollouts}) > 10
    assert _difference(policy, rollouts, 0.9) <= _TOLERANCE[dtype]
    session = engine._session
    again = engine.generate(prompts, 8, sampling)
    assert engine._session is session
    assert [r.token_ids for r in again] == [r.token_ids for r in rollouts]
    assert all(torch.equal(a.sampling_logprob, b.sampling_logprob) for a, b in zip(again, rollouts, strict=True))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)  # captured steps read the weights of now
    assert _difference(policy, engine.generate(prompts, 8, sampling), 0.9) <= _TOLERANCE[dtype]
    assert engine._session is session


def test_layers_of_another_make_are_captured_as_they_are(tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = tf.Gemma2Config(**_SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=40)
    policy = _policy(config, tiny_tokenizer, "bfloat16")
    engine = LoopEngine(policy.model, policy.tokenizer, batch_size=24)
    for seed in (3, 4):
        rollouts = engine.generate(_prompts(3, 300, 64), 8, Sampling(150, seed=seed))
        assert _difference(policy, rollouts, 1.0) <= _TOLERANCE["bfloat16"]
    assert (engine.reason, engine.unslotted, engine.uncaptured) == (None,) * 3
    assert engine.unfused is not None
    assert [record.args for record in caplog.records if "slower" in record.message] == [(engine.unfused,)]


def test_greedy_tokens_are_those_of_generate(tiny_tokenizer: Any) -> None:
    policy = _policy(_FAMILIES["qwen3"], tiny_tokenizer, "float32")
    prompts = _prompts(5, 40)
    engine = LoopEngine(policy.model, policy.tokenizer)
    rollouts = engine.generate(prompts, 2, Sampling(40, 0.0))
    for prompt, rollout in zip(prompts, rollouts[::2], strict=True):
        ids = torch.tensor([prompt.token_ids], device=policy.device)
        made = policy.model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=sorted(engine.end_tokens))
        assert made[0, len(prompt.token_ids) :].tolist() == rollout.token_ids


def test_a_burst_s_tokens_are_not_awaited(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When rows are told of, the device is still at work, and what comes back lies in pinned memory."""
    policy = _policy(_FAMILIES["qwen2"], tiny_tokenizer, "bfloat16")
    engine = LoopEngine(policy.model, policy.tokenizer)
    engine.generate(_prompts(100), 8, Sampling(64))  # graphs are captured
    busy: list[bool] = []
    deliver = burst.SlotDecoder._deliver

    def look(self: Any, *args: Any) -> None:
        busy.append(not torch.cuda.current_stream(policy.device).query())
        deliver(self, *args)

    monkeypatch.setattr(burst.SlotDecoder, "_deliver", look)
    engine.generate(_prompts(100), 8, Sampling(64))
    assert sum(busy) > len(busy) / 2
    assert torch.zeros(3, device=policy.device).to("cpu", non_blocking=True).is_pinned()


def test_memory_does_not_grow_with_the_prompts(tiny_tokenizer: Any) -> None:
    policy = _policy(_FAMILIES["qwen2"], tiny_tokenizer, "bfloat16")
    peaks = []
    for count in (8, 80):
        engine = LoopEngine(policy.model, policy.tokenizer, batch_size=32)
        torch.cuda.reset_peak_memory_stats()
        engine.generate(_prompts(*([100] * count)), 8, Sampling(64))
        peaks.append(torch.cuda.max_memory_allocated())
        engine.close()
    assert peaks[1] <= 1.05 * peaks[0]


def _even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def test_a_run_resumes_bitwise_on_a_gpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "ab" * (i + 1)} for i in range(12)]

    def run(folder: str, steps: int) -> GRPOTrainer:
        config = GRPOConfig(
            output_dir=str(tmp_path / folder), max_steps=steps, num_prompts_per_step=4, num_generations=4,
            max_completion_length=24, learning_rate=1e-3, device="cuda:0", save_steps=2, disable_progress=True,
            report_to=["none"],
        )  # fmt: skip
        trainer = GRPOTrainer(str(tiny_model_dir), _even, config, rows)
        trainer.train()
        return trainer

    whole = run("whole", 4)
    run("cut", 2)
    resumed = run("cut", 4)
    pairs = zip(whole.policy.model.named_parameters(), resumed.policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
