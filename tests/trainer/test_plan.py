"""fastgrpo/plan against what is really allocated: to the byte what stays, the peaks of real phases within 10 %."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import peak_tensor_bytes
from fastgrpo.config import GRPOConfig
from fastgrpo.distributed import Ranks
from fastgrpo.gpus import GPUS, Device
from fastgrpo.optim import Optimizer
from fastgrpo.packing import denominators, pack
from fastgrpo.plan.planner import MemoryPlanner, plan_run
from fastgrpo.plan.records import Plan, Workload
from fastgrpo.plan.seconds import predict_seconds
from fastgrpo.plan.shapes import describe_shape
from fastgrpo.policy import Policy, Reference, load_policy, make_critic
from fastgrpo.policy.loading import skeleton_of
from fastgrpo.records import Prompt, Rollout, RolloutBatch, Sampling
from fastgrpo.rollout.loop import LoopEngine
from fastgrpo.update import Updater
from fastgrpo_kernels import vocabulary

_peak = partial(peak_tensor_bytes, torch.device("cpu"))
_CPU = Device("CPU", 32 << 30)
_LOAD = Workload(prompts=3, group=4, prompt=60, longest=120, mean=120)
_SMALL: dict[str, Any] = {
    "vocab_size": 4000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MEDIUM = _SMALL | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 16000}
_UNTIED = _SMALL | {"vocab_size": 12000, "tie_word_embeddings": False}
_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp32": ("Qwen3", _SMALL, {"dtype": "float32"}),
    "bf16": ("Qwen3", _SMALL, {"dtype": "bfloat16", "beta": 0.1}),
    "checkpointed": ("Llama", _SMALL, {"dtype": "bfloat16", "gradient_checkpointing": True, "beta": 0.1}),
    "one-sequence": ("Qwen2", _SMALL | {"vocab_size": 10000}, {"dtype": "bfloat16", "max_tokens_per_microbatch": 64}),
    "every-2nd": ("Qwen2", _SMALL, {"dtype": "float32", "gradient_checkpointing": True, "num_minibatches": 3}),
    "no-masters": ("Qwen2", _UNTIED, {"dtype": "bfloat16", "master_weights": False}),
    "many-microbatches": ("Llama", _UNTIED, {"dtype": "bfloat16", "max_tokens_per_microbatch": 300}),
    "lora": ("Qwen3", _SMALL, {"dtype": "bfloat16", "use_peft": True, "lora_r": 8, "beta": 0.1}),
    "lora-checkpointed": ("Llama", _UNTIED, {"use_peft": True, "gradient_checkpointing": True}),
    "medium": ("Qwen3", _MEDIUM, {"dtype": "float32", "gradient_checkpointing": True, "num_minibatches": 3}),
}
_CASES["every-2nd"][2]["gradient_checkpointing_every"] = 2
_FUSED = ("fp32", "bf16", "checkpointed", "every-2nd", "many-microbatches", "lora", "lora-checkpointed")
_CASES |= {
    f"{name}, fused": (family, sizes, options | {"fused_layers": True})
    for name, (family, sizes, options) in _CASES.items()
    if name in _FUSED
}


def _config(**options: Any) -> GRPOConfig:
    sizes = {"num_prompts_per_step": _LOAD.prompts, "num_generations": _LOAD.group, "rollout_engine": "loop"}
    made = {"max_completion_length": _LOAD.longest, "check_sampling": False, "device": "cpu"}
    return GRPOConfig(**{**sizes, **made, **options})


def _model_config(family: str, sizes: dict[str, Any]) -> Any:
    return getattr(transformers, f"{family}Config")(**sizes)


def _planned(family: str, sizes: dict[str, Any], config: GRPOConfig, load: Workload = _LOAD) -> Plan:
    return plan_run(describe_shape(skeleton_of(_model_config(family, sizes)), config), config, _CPU, load)


def _policy(family: str, sizes: dict[str, Any], config: GRPOConfig, tokenizer: Any) -> Policy:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_model_config(family, sizes))
    return load_policy(model, tokenizer, config)


def _batch() -> RolloutBatch:
    rollouts = []
    for g in range(_LOAD.prompts):
        prompt = Prompt(g, "", [5 + g] * _LOAD.prompt)
        for k in range(_LOAD.group):
            ids, logprobs = [7 + k] * _LOAD.longest, -torch.ones(_LOAD.longest)
            rollouts.append(Rollout(prompt, g, ids, logprobs, True, reward=k % 2, advantage=k % 2 - 0.5))
    return RolloutBatch(rollouts, {})


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of storages that are there, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}
    return sum(s.nbytes() for s in storages.values())


def _state(optimizer: Optimizer) -> list[Tensor]:
    return [t for s in optimizer.torch_optimizer.state.values() for t in s.values()]


def _gradients(optimizer: Optimizer) -> list[Tensor | None]:
    return [p.grad for group in optimizer.torch_optimizer.param_groups for p in group["params"]]


def _temporary(plan: Plan, phase: str) -> int:
    """What the phase adds to what stays."""
    return sum(plan.phases[phase].values()) - sum(model.total for model in plan.models.values())


@pytest.mark.parametrize("case", _CASES)
def test_parts_to_the_byte_and_peaks_within_ten_percent(case: str, tiny_tokenizer: Any) -> None:
    family, sizes, options = _CASES[case]
    config = _config(**options)
    if config.use_peft:
        pytest.importorskip("peft")
    plan = _planned(family, sizes, config)
    policy = _policy(family, sizes, config, tiny_tokenizer)
    optimizer = Optimizer(policy.trainable(), config)
    reference = Reference(policy) if config.beta else None
    updater, batch = Updater(policy, reference, optimizer, config), _batch()
    updater.prepare(batch)
    updater.step(batch, 1e-6)

    weights = _bytes([*policy.model.parameters(), *optimizer.masters().values()])
    assert plan.models["policy"].weights == weights
    assert plan.models["policy"].gradients == _bytes(_gradients(optimizer))
    assert plan.models["policy"].optimizer == _bytes(_state(optimizer))
    lasting = weights + _bytes(_gradients(optimizer)) + _bytes(_state(optimizer))
    if reference is not None:
        assert plan.models["reference"].total == _bytes(reference.weights().values())
        lasting += _bytes(reference.weights().values())

    batch.used = 0
    measured = {"update": _peak(lambda: updater.step(batch, 1e-6))}
    if reference is not None or config.num_minibatches > 1:
        for rollout in batch.rollouts:
            rollout.ref_logprob = rollout.old_logprob = None
        measured["reference" if reference else "old log-probs"] = _peak(lambda: updater.prepare(batch))
    for phase, peak in measured.items():
        assert peak == pytest.approx(_temporary(plan, phase), rel=0.1), phase
        assert lasting + peak == pytest.approx(sum(plan.phases[phase].values()), rel=0.1), phase
    assert lasting + max(measured.values()) == pytest.approx(plan.peak, rel=0.1)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float32"}, {"use_peft": True, "lora_r": 8}])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_of_several_processes_each_has_what_it_owns(
    processes: int, options: dict[str, Any], tiny_tokenizer: Any
) -> None:
    config = _config(**options)
    if config.use_peft:
        pytest.importorskip("peft")
    plan = _planned("Qwen3", _UNTIED, config, replace(_LOAD, prompts=1, processes=processes)).models["policy"]
    policy = _policy("Qwen3", _UNTIED, config, tiny_tokenizer)
    model = _bytes(policy.model.parameters())
    held = []
    for rank in range(processes):
        optimizer = Optimizer(policy.trainable(), config, Ranks(rank, processes))
        optimizer.torch_optimizer.step()
        held.append((model + _bytes(optimizer.masters().values()), _bytes(_state(optimizer))))
        assert plan.gradients == _bytes(p.grad for p in optimizer._masters)
        optimizer.close()
        for parameter in policy.model.parameters():
            parameter.grad = None
    assert (plan.weights, plan.optimizer) == max(held)
    assert plan.optimizer < 1.25 * sum(size for _, size in held) / processes or processes == 8


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float32", "gradient_checkpointing": True}])
def test_the_critic_of_ppo(
    options: dict[str, Any], fused: bool, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options | {"fused_layers": fused}
    if fused:  # backwards on a CPU work in blocks, which are as large as all that is here; kernels need nothing
        monkeypatch.setattr(vocabulary, "BLOCK_ELEMENTS", 1 << 14)
    config = _config(algorithm="ppo", **options)
    plan = _planned("Qwen3", _UNTIED, config)
    policy = _policy("Qwen3", _UNTIED, config, tiny_tokenizer)
    critic = make_critic(policy, config)
    optimizers = [Optimizer(m.trainable(), config) for m in (policy, critic)]
    updater = Updater(policy, Reference(policy), optimizers[0], config, critic, optimizers[1])
    batch = _batch()
    updater.prepare(batch)
    updater.step(batch, 1e-6, 1e-6)
    own = {p.data_ptr() for p in policy.model.parameters()}
    copies = [p for p in critic.body.model.parameters() if p.data_ptr() not in own]
    weights = [*copies, *critic.value_head.parameters(), *optimizers[1].masters().values()]
    assert plan.models["critic"].weights == _bytes(weights)
    assert plan.models["critic"].gradients == _bytes(_gradients(optimizers[1]))
    assert plan.models["critic"].optimizer == _bytes(_state(optimizers[1]))
    whole = denominators(batch.rollouts, mask_truncated=False)
    learn = _peak(lambda: updater._critic_step(batch.rollouts, whole, 1e-6))
    assert learn == pytest.approx(_temporary(plan, "critic update"), rel=0.1)
    batch.used = 0
    assert _peak(lambda: updater.step(batch, 1e-6, 1e-6)) == pytest.approx(_temporary(plan, "update"), rel=0.1)


@pytest.mark.parametrize(("case", "longest"), [("fp32", 65), ("lora", 66)])  # 64 keys fit the smallest slab
def test_rollouts(case: str, longest: int, tiny_tokenizer: Any) -> None:
    """Keys and values to the byte where every completion is the longest, and never more; the rest within 10 %."""
    family, sizes, options = _CASES[case]
    load = replace(_LOAD, longest=longest, mean=longest)
    config = _config(rollout_batch_size=8, **options)
    plan = _planned(family, sizes, config, load)
    policy = _policy(family, sizes, config, tiny_tokenizer)
    engine = LoopEngine(policy.model, policy.tokenizer, batch_size=config.rollout_batch_size)
    prompts = [Prompt(i, "", [5 + i] * load.prompt) for i in range(load.prompts)]
    sampling = Sampling(load.longest)
    engine.generate(prompts[:1], 1, Sampling(2))  # asks which way it goes
    engine.end_tokens = set()
    peak = _peak(lambda: engine.generate(prompts, _LOAD.group, sampling))
    assert engine.cache_bytes == plan.phases["rollout"]["cache"]
    lasting = sum(model.total for model in plan.models.values())
    assert lasting + peak == pytest.approx(sum(plan.phases["rollout"].values()), rel=0.1)
    engine.end_tokens = set(range(60))
    engine.generate(prompts, _LOAD.group, sampling)
    assert 0 < engine.cache_bytes <= plan.phases["rollout"]["cache"]


@pytest.mark.parametrize("budget", [100, 200, 500, 700, 1300, 5000])
@pytest.mark.parametrize("share", [True, False])
def test_micro_batches_are_no_larger_than_planned(budget: int, share: bool) -> None:
    config = _config(max_tokens_per_microbatch=budget, share_prompts=share)
    tokens, scored = _LOAD.microbatch(config)
    batches = pack(_batch().rollouts, max_tokens=budget, share=share)
    assert tokens <= max(budget, _LOAD.prompt + _LOAD.longest)
    assert tokens / 2 < max(len(b.input_ids) for b in batches) <= tokens  # first fit leaves no more
    assert scored / 2 < max(len(b.target) for b in batches) <= scored
    if len(batches) == 1:
        assert (tokens, scored) == (len(batches[0].input_ids), len(batches[0].target))


@pytest.mark.parametrize("every", [0, 1])
def test_the_matrix_products_of_an_update(every: int, tiny_tokenizer: Any) -> None:
    """FLOPs of the layers, as torch counts them; the LM head is an op of ours that it does not look into.

    A layer that is run again stops before its last product, a quarter of its weights here.
    """
    config = _config(dtype="float32", gradient_checkpointing=bool(every))
    policy = _policy("Qwen3", _SMALL, config, tiny_tokenizer)
    updater = Updater(policy, None, Optimizer(policy.trainable(), config), config)
    with FlopCounterMode(display=False) as counter:
        updater.step(_batch(), 1e-6)
    tokens, _ = _LOAD.microbatch(config)
    predicted = (3 + 0.75 * every) * policy.work.per_token * tokens
    rotation = _SMALL["head_dim"] * tokens  # frequencies @ positions, until transformers 5.23 multiplied them plainly
    assert counter.get_total_flops() - predicted in (0, rotation)


def _seconds(device: Device, **options: Any) -> dict[str, float]:
    config = _config(dtype="bfloat16", **options)
    shape = describe_shape(skeleton_of(_model_config("Qwen3", _MEDIUM)), config)
    return predict_seconds(MemoryPlanner(shape, config, device, _LOAD, reference=config.beta > 0, critic=False))


@pytest.mark.parametrize(
    ("family", "options", "fused"),
    [
        ("Qwen3", {}, True),
        ("Qwen3", {"torch_compile": True}, False),
        ("Qwen3", {"fused_layers": False}, False),
        ("SmolLM3", {}, True),
        ("Phi3", {}, False),
        ("Gemma2", {}, False),
    ],
)
def test_layers_are_fused_on_a_gpu_where_they_can_be(family: str, options: dict[str, Any], fused: bool) -> None:
    config = _config(**options)
    shape = describe_shape(skeleton_of(_model_config(family, _SMALL)), config)
    gpu, cpu = (plan_run(shape, config, device, _LOAD) for device in (GPUS["h100"], _CPU))
    assert (gpu.inputs["fused_layers"], cpu.inputs["fused_layers"]) == (fused, False)


def test_fused_layers_take_less_of_both() -> None:
    eager, fused = (_seconds(GPUS["h200"], fused_layers=asked, beta=0.1) for asked in (False, None))
    assert fused["update"] < eager["update"]
    assert fused["reference"] < eager["reference"]
    assert {name: fused[name] for name in ("rollout", "optimizer step")} == {
        name: eager[name] for name in ("rollout", "optimizer step")
    }
    config = _config(dtype="bfloat16")
    shape = describe_shape(skeleton_of(_model_config("Qwen3", _MEDIUM)), config)
    stock, kept = (
        plan_run(shape, replace(config, fused_layers=asked), GPUS["h200"], _LOAD).phases["update"]["activations"]
        for asked in (False, None)
    )
    assert kept < 0.8 * stock


def test_fused_layers_that_no_run_would_have_are_said() -> None:
    config = _config(fused_layers=True)
    shape = describe_shape(skeleton_of(_model_config("Granite", _SMALL)), config)
    [note] = plan_run(shape, config, _CPU, _LOAD).notes
    assert note == (
        "activations are not counted: fused layers are known for llama, mistral, qwen2, smollm3, qwen3; "
        "those of 'granite' are not"
    )


def test_seconds_follow_the_rates() -> None:
    fast, slow = GPUS["h200"], GPUS["l4"]
    quick, long = _seconds(fast, beta=0.1, num_minibatches=3), _seconds(slow, beta=0.1, num_minibatches=3)
    assert quick.keys() == {"rollout", "reference", "old log-probs", "update", "optimizer step"}
    assert all(0 < quick[stage] < long[stage] for stage in quick)
    assert quick["old log-probs"] == pytest.approx(quick["reference"] * 2 / 3)
    # AdamW of 16-bit weights with masters: 5 * 4 of gradients, 2 * 8 of moments, 2 * (2 + 4) of weights.
    config = _config()
    numbers = describe_shape(skeleton_of(_model_config("Qwen3", _MEDIUM)), config).parameters
    step = _seconds(fast)["optimizer step"]
    assert step == pytest.approx(48 * numbers / (0.85 * 4.8e12), rel=1e-3)
    ratio = _seconds(fast, gradient_checkpointing=True)["update"] / _seconds(fast)["update"]
    assert 1.15 < ratio < 1.4


def test_a_gpu_s_update_is_its_head_s_and_layers_parts() -> None:
    """On a GPU the head holds gradient rows and fp32 sums, and slots are all there from the start."""
    config = _config(dtype="bfloat16", max_tokens_per_microbatch=4096)
    shape = describe_shape(skeleton_of(_model_config("Qwen3", _UNTIED)), config)
    plan = plan_run(shape, config, GPUS["h100"], _LOAD)
    scored, hidden, vocab = plan.inputs["microbatch_scored"], 192, 12000
    padded = -(-vocab // 64) * 64
    expected = 2 * scored * padded + 6 * scored * hidden + 4 * (scored + vocab) * hidden
    assert plan.phases["update"]["head"] == expected
    assert plan.needed > plan.peak + 800_000_000
    assert plan.fits


def test_unknown_layers_are_said_to_be_missing() -> None:
    config = _config()
    model = skeleton_of(transformers.Gemma2Config(**_SMALL))
    plan = plan_run(describe_shape(model, config), config, GPUS["h100"], _LOAD)
    [note] = plan.notes
    assert "activations are not counted" in note
    assert "gemma2" in note
    assert plan.phases["update"]["activations"] == 0
    assert plan.models["policy"].total > 0
    assert plan.phases["update"]["head"] > 0
