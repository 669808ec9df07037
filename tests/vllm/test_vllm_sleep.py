"""The order in which a GPU's memory changes hands. A CPU has no sleep mode, so vLLM is a stand-in here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.rollout.vllm import engine as vllm_engine
from fastgrpo.rollout.vllm.engine import VLLMEngine
from fastgrpo.rollout.vllm.weights import checkpoint_weights

from .cases import make_policy, optimizer_step


class StandIn:
    """Notes the calls, and the weights that came with them."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        self.weights = {name: tensor.clone() for name, tensor in kwargs["weights_iterator"]}

    def apply_model(self, function: Any) -> None:
        """Nothing to apply it to."""

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> VLLMEngine:
    monkeypatch.setattr(vllm_engine, "import_vllm", lambda: SimpleNamespace(LLM=StandIn))
    return VLLMEngine(make_policy(), max_length=64, engine_args={"enable_sleep_mode": True})


def holds(engine: VLLMEngine, policy: Any) -> bool:
    expected = dict(checkpoint_weights(policy))
    held = engine._llm.weights
    return held.keys() == expected.keys() and all(torch.equal(held[n], t) for n, t in expected.items())


def test_an_engine_starts_awake_with_the_policys_weights(engine: VLLMEngine) -> None:
    assert engine._llm.calls == ["reload_weights", "reset"]
    assert holds(engine, engine._policy)
    assert engine._llm.arguments["max_model_len"] == 64
    assert engine._llm.arguments["dtype"] == "float32"


def test_weights_come_before_the_cache_and_only_to_an_engine_awake(engine: VLLMEngine) -> None:
    policy = make_policy(seed=1)
    engine._llm.calls.clear()
    engine.wake()
    engine.sleep()
    engine.sleep()
    optimizer_step(policy.model)
    engine.sync(policy)
    assert engine._llm.calls == ["sleep 2"]
    engine.wake()
    engine.wake()
    assert engine._llm.calls == ["sleep 2", "wake weights", "reload_weights", "reset", "wake kv_cache"]
    assert holds(engine, policy)
    assert engine.version == 1


def test_weights_come_back_without_a_sync(engine: VLLMEngine) -> None:
    engine.sleep()
    engine._llm.weights = {}
    engine.wake()
    assert holds(engine, engine._policy)
    assert engine.version == 0


def test_a_policy_on_another_gpu_is_refused() -> None:
    policy = make_policy()
    policy.device = torch.device("cuda:1")
    with pytest.raises(ValueError, match="runs on the first GPU, the policy is on cuda:1"):
        VLLMEngine(policy)
