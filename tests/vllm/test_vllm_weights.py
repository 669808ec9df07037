"""The weights that vLLM is given are those a checkpoint would hold. Needs no vLLM."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fastgrpo.policy import Policy
from fastgrpo.rollout.vllm import weights as vllm_weights
from fastgrpo.rollout.vllm.requests import check_version, import_vllm
from fastgrpo.rollout.vllm.weights import checkpoint_weights, write_model_folder

from .cases import make_policy, optimizer_step


def make_moe() -> Policy:
    """Its experts are one tensor per layer in memory, and one per expert in a checkpoint."""
    config = Qwen3MoeConfig(
        vocab_size=105,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    return Policy(Qwen3MoeForCausalLM(config).float().eval(), make_tokenizer())


POLICIES: dict[str, Callable[[], Policy]] = {
    "tied": make_policy,
    "untied": lambda: make_policy(tied=False),
    "experts": make_moe,
}


@pytest.mark.parametrize("kind", POLICIES)
def test_names_and_values_are_those_of_save_pretrained(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = POLICIES[kind]()
    policy.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    weights = dict(checkpoint_weights(policy))
    assert weights.keys() == saved.keys()
    assert ("lm_head.weight" in weights) == (kind != "tied")
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
    assert not any(tensor.requires_grad for tensor in weights.values())


@pytest.mark.parametrize("kind", POLICIES)
def test_a_folder_holds_them_whenever_it_is_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_weights, "_SHARD_BYTES", 30_000)  # several files
    policy = POLICIES[kind]()
    write_model_folder(policy, tmp_path, weights=False)
    assert not list(tmp_path.glob("*.safetensors"))
    for _ in range(2):  # written over, as every sync does
        optimizer_step(policy.model)
        write_model_folder(policy, tmp_path)
        shards = sorted(tmp_path.glob("*.safetensors"))
        assert len(shards) > 1
        assert not list(tmp_path.glob(".tmp*"))
        weights = dict(checkpoint_weights(policy))
        written = read(shards)
        assert written.keys() == weights.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())
    assert AutoConfig.from_pretrained(tmp_path).architectures == [type(policy.model).__name__]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == policy.tokenizer.get_vocab()


def read(shards: list[Path]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head", "norm"]}], ids=str)
def test_adapters_are_merged_on_a_copy(extra: dict[str, Any]) -> None:
    policy = make_policy(tied=False)
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"] if not extra else ["q_proj", "up_proj"]}
    lora = LoraConfig(r=4, lora_alpha=7, init_lora_weights=False, **targets, **extra)
    adapted = Policy(get_peft_model(policy.model, lora), policy.tokenizer)
    optimizer_step(adapted.model)
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    weights = {name: tensor.clone() for name, tensor in checkpoint_weights(adapted)}
    after = adapted.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    expected = adapted.model.merge_and_unload().state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("extra", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_tied_embeddings_are_refused(extra: dict[str, Any]) -> None:
    lora = LoraConfig(**{"target_modules": ["q_proj"]} | extra)
    with pytest.warns(UserWarning, match="tie"):
        adapted = Policy(get_peft_model(make_policy().model, lora), make_tokenizer())
    with pytest.raises(ValueError, match="tied embeddings"):
        list(checkpoint_weights(adapted))


def test_wrappers_that_do_not_merge_are_refused() -> None:
    lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    adapted = Policy(get_peft_model(make_policy(tied=False).model, lora), make_tokenizer())
    with pytest.raises(ValueError, match=r"embed_tokens: TrainableTokensWrapper"):
        list(checkpoint_weights(adapted))


def test_a_missing_vllm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"^rollout_engine .* need vLLM: pip install 'fastgrpo\[vllm\]'$"):
        import_vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "1.0", "dev"])
def test_a_version_that_will_do(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.20.0", "0.31.4", "0.9.1rc1"])
def test_an_old_version_is_one_line(version: str) -> None:
    with pytest.raises(ImportError, match=rf"^vLLM {version} is too old, 0\.32 is needed: pip install --upgrade"):
        check_version(version)
