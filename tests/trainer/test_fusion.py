"""The update's layers in few kernels: transformers' numbers and gradients, and everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from policy_cases import GROUPS, OTHERS, assert_same, gradients_of, make_batch, two_policies
from torch import Tensor

from fastgrpo import GRPOConfig
from fastgrpo.config import ConfigError
from fastgrpo.policy import Policy, Reference, fusion, load_policy
from fastgrpo.policy.attention import Packed, register
from fastgrpo.policy.fusion import fuse_layers

_FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 90},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}


def _policies(family: str, **options: Any) -> list[Policy]:
    """The same model twice: as transformers has it, and fused."""
    policies = two_policies(family, **options)
    assert fuse_layers(policies[1].model) is None
    return policies


@pytest.mark.parametrize("family", _FAMILIES)
def test_numbers_and_gradients_are_the_model_s_own(family: str) -> None:
    policies = _policies(family, **_FAMILIES[family])
    policies[1].self_check()
    assert policies[1].shares
    for groups in [GROUPS, *OTHERS]:
        for share in (True, False):
            assert_same(policies, make_batch(groups, share=share), 3e-6)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_gradients_in_half_precision_are_no_further_off(family: str) -> None:
    """Than transformers' own, from those in float64, which its norms take in fp32."""
    batch = make_batch()
    exact = two_policies(family, dtype=torch.bfloat16)[0]
    exact.model.double()
    policies = _policies(family, dtype=torch.bfloat16)
    (_, true), *found = (gradients_of(policy, batch) for policy in (exact, *policies))
    stock, fused = (
        sum((a.double() - b).square().sum() for a, b in zip(gradients, true, strict=True)).sqrt()
        for _, gradients in found
    )
    assert fused <= 1.5 * stock


def _kept(policy: Policy, tokens: int = 48) -> int:
    """Bytes that autograd keeps of a forward, storages once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    batch = make_batch([(tokens // 2, [tokens // 2])])
    with policy.mode(training=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        states = policy.hidden(batch)
    kept = sum(storage.nbytes() for storage in storages.values())
    del states
    return kept


def test_less_is_kept_for_the_backward() -> None:
    for family, share in (("Llama", 0.8), ("Qwen3", 0.8)):
        stock, fused = (_kept(policy) for policy in _policies(family, dtype=torch.bfloat16))
        assert fused < share * stock


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_stays_around_layers(every: int) -> None:
    policies, batch = _policies("Qwen3"), make_batch()
    for policy in policies:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        for i, layer in enumerate(policy.causal_lm.model.layers):
            layer.gradient_checkpointing = i % every == 0
    assert_same(policies, batch, 3e-6)
    for policy in policies:
        packed = Packed(batch.layout)
        packed.windows = []
        with policy.mode(training=True):
            policy.states(batch.input_ids, packed).sum().backward()
        assert len(packed.windows) == 3 + len(range(0, 3, every))  # each layer once, and what is computed again


def test_adapters_train_and_switch_off() -> None:
    pytest.importorskip("peft")
    policies, batch = _policies("Qwen3", lora=True), make_batch()
    on = policies[0].logprobs(batch, 1.0)[0]
    assert_same(policies, batch, 3e-6)
    off = [Reference(policy).logprobs(batch, 1.0)[0] for policy in policies]
    assert (off[0] - off[1]).abs().max() <= 3e-6 * off[0].abs().max()
    assert not torch.allclose(off[0], on)


def test_ordinary_forwards_are_the_model_s_own() -> None:
    stock, fused = (policy.causal_lm for policy in _policies("Qwen3"))
    ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(3))
    for implementation in (register(), "sdpa"):
        for model in (stock, fused):
            model.set_attn_implementation(implementation)
        outputs = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (stock, fused)]
        assert torch.equal(*outputs)
        assert torch.equal(stock(input_ids=ids).logits, fused(input_ids=ids).logits)


def test_weights_save_under_their_names_and_keep_their_ties(tmp_path: Path) -> None:
    stock, fused = (policy.causal_lm for policy in _policies("Qwen3", tied=True))
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert fused.lm_head.weight is fused.model.embed_tokens.weight
    fused.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0]) is type(stock.model.layers[0])
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_copy_is_fused_on_weights_of_its_own() -> None:
    policies, batch = _policies("Llama"), make_batch()
    before = policies[0].logprobs(batch, 1.0)[0]
    references = [Reference(policy) for policy in policies]
    with torch.no_grad():
        for policy in policies:
            for parameter in policy.causal_lm.model.layers[0].parameters():
                parameter.mul_(1.5)
    first, second = (reference.logprobs(batch, 1.0)[0] for reference in references)
    assert torch.equal(first, before)
    assert (first - second).abs().max() <= 3e-6 * first.abs().max()
    assert references[1].frozen is not None
    assert type(references[1].frozen.causal_lm.model.layers[0]) is type(policies[1].causal_lm.model.layers[0])
    assert_same(policies, batch, 3e-6)


def test_layers_whose_gradients_differ_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    policies, batch = two_policies("Qwen3"), make_batch()
    call = fusion.FusedLayer.__call__

    def cut(*args: Any) -> tuple[Tensor, Tensor]:
        x, residual = call(*args)
        return x.detach(), residual

    monkeypatch.setattr(fusion.FusedLayer, "__call__", cut)
    reason = fuse_layers(policies[1].model)
    assert reason is not None
    assert "gradients differ" in reason
    monkeypatch.undo()
    assert type(policies[1].causal_lm.model.layers[0]) is type(policies[0].causal_lm.model.layers[0])
    assert_same(policies, batch, 0.0)


def test_kernels_that_fail_backwards_leave_layers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("no kernel image")

    policies, batch = two_policies("Qwen3"), make_batch()
    monkeypatch.setattr(fusion, "_gradients_differ", fail)
    assert fuse_layers(policies[1].model) == "RuntimeError: no kernel image"
    assert_same(policies, batch, 0.0)


class TestOption:
    def test_as_asked_for(self, tiny_model_dir: Path) -> None:
        fused, stock, default = (
            load_policy(str(tiny_model_dir), None, GRPOConfig(fused_layers=asked)) for asked in (True, False, None)
        )
        kinds = [type(policy.causal_lm.model.layers[0]) for policy in (fused, stock, default)]
        assert kinds[0] is not kinds[1]
        assert kinds[2] is kinds[1]  # on a CPU
        assert_same([stock, fused], make_batch(), 3e-6)

    def test_other_layers_are_refused_when_asked_for(self) -> None:
        config = transformers.OlmoConfig(
            vocab_size=110, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = transformers.OlmoForCausalLM(config)
        with pytest.raises(ValueError, match=r"fused_layers=true: OlmoForCausalLM has others: .*its norms are OlmoLay"):
            load_policy(model, _Tokenizer(), GRPOConfig(fused_layers=True))

    def test_not_with_torch_compile(self) -> None:
        with pytest.raises(ConfigError, match="fused_layers=true and torch_compile=true: choose one"):
            GRPOConfig(fused_layers=True, torch_compile=True)


class _Tokenizer:
    def __len__(self) -> int:
        return 100
