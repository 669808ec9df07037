"""Compiled decoder layers: the eager ones' numbers, one compilation for all batches, and everything else as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

from fastgrpo.packing import pack
from fastgrpo.policy import Policy, Reference
from fastgrpo.policy.attention import Packed, register
from fastgrpo.policy.compilation import compile_layers
from fastgrpo.records import PackedBatch, Prompt, Rollout

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_GROUPS = [(5, [4, 1, 7, 3]), (1, [6, 2]), (8, [5]), (3, [2, 2, 9])]
# Other lengths, numbers of prompts and of completions, of tokens; a lone completion, lengths of 1.
_OTHERS = [[(5, [4])], [(1, [1, 1]), (1, [1])], [(30, [9] * 6)], [(4, [2, 40]), (60, [1])], [(3, [3])] * 9]


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _policies(family: str, backend: str = "aot_eager", *, lora: bool = False, tied: bool = False) -> list[Policy]:
    """The same model twice: eager, and compiled."""
    config = getattr(transformers, f"{family}Config")(**_SMALL, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_attn_implementation(register())
    if lora:
        from peft import LoraConfig, get_peft_model

        adapters = {"target_modules": ["q_proj"], "init_lora_weights": False, "r": 2}
        model = get_peft_model(model, LoraConfig(**adapters)).eval()
    policies = [Policy(model, None), Policy(copy.deepcopy(model), None)]
    compile_layers(policies[1].causal_lm, backend)
    return policies


def _batch(groups: list[tuple[int, list[int]]] = _GROUPS, *, share: bool = True) -> PackedBatch:
    generator = torch.Generator().manual_seed(7)
    rollouts = []
    for g, (length, lengths) in enumerate(groups):
        prompt = Prompt(g, "", torch.randint(3, 61, (length,), generator=generator).tolist())
        for c in lengths:
            ids = torch.randint(3, 61, (c,), generator=generator).tolist()
            rollouts.append(Rollout(prompt, g, ids, torch.zeros(c), finished=True, reward=1.0))
    [batch] = pack(rollouts, max_tokens=10_000, share=share)
    return batch


def _gradients(policy: Policy, batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
    """Logits of the scored tokens, and the gradients of a loss that weighs each of them otherwise."""
    policy.model.zero_grad(set_to_none=True)
    with policy.mode(training=True):
        logits = policy.head.logits(policy.hidden(batch))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * weights).sum().backward()
    return logits.detach(), [p.grad for _, p in policy.trainable() if p.grad is not None]


def _assert_same(policies: list[Policy], batch: PackedBatch, tolerance: float = 1e-6) -> None:
    (logits, gradients), (other_logits, others) = (_gradients(policy, batch) for policy in policies)
    assert (other_logits - logits).abs().max() <= tolerance * logits.abs().max()
    largest = max(g.abs().max() for g in gradients)
    assert len(gradients) == len(policies[0].trainable())
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).abs().max() <= tolerance * largest
    (logprob, entropy), (other, other_entropy) = (policy.logprobs(batch, 0.9) for policy in policies)
    assert (other - logprob).abs().max() <= tolerance * logprob.abs().max()
    assert (other_entropy - entropy).abs().max() <= tolerance * entropy.abs().max()


def _compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_numbers_are_the_eager_ones_and_one_compilation_serves_all_batches(family: str) -> None:
    policies = _policies(family)
    before = _compiled_graphs()
    policies[1].self_check()
    assert policies[1].shares
    _assert_same(policies, _batch())
    # Around attention, whatever the number of layers: with gradients, without, and one of them anew for the self-check,
    # which also runs in training mode without gradients.
    assert _compiled_graphs() - before == 2 * 4 + 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for groups in [_GROUPS, *_OTHERS]:
            for share in (True, False):
                _assert_same(policies, _batch(groups, share=share))
    assert _compiled_graphs() - before == 2 * 4 + 1


def test_inductor_gives_the_eager_numbers() -> None:
    policies = _policies("Qwen3", "inductor")
    _assert_same(policies, _batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        _assert_same(policies, _batch(_OTHERS[3]))


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_stays_around_what_is_compiled(every: int) -> None:
    policies, batch = _policies("Qwen3"), _batch()
    _assert_same(policies, batch)
    for policy in policies:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        for i, layer in enumerate(policy.causal_lm.model.layers):
            layer.gradient_checkpointing = i % every == 0
    _assert_same(
        policies, batch
    )  # transformers' hook on the embedding asks for its gradients, also where there are none
    with torch._dynamo.config.patch(error_on_recompile=True):
        _assert_same(policies, batch)
        for policy in policies:
            packed = Packed(batch.layout)
            packed.windows = []
            with policy.mode(training=True):
                policy.states(batch.input_ids, packed).sum().backward()
            assert len(packed.windows) == 3 + len(range(0, 3, every))  # each layer once, and what is computed again


def test_adapters_train_and_switch_off() -> None:
    policies, batch = _policies("Qwen3", lora=True), _batch()
    on = policies[0].logprobs(batch, 1.0)[0]
    for _ in range(2):
        _assert_same(policies, batch)
        off = [Reference(policy).logprobs(batch, 1.0)[0] for policy in policies]
        assert (off[0] - off[1]).abs().max() <= 1e-6 * off[0].abs().max()
        assert not torch.allclose(off[0], on)


def test_generation_and_other_ordinary_forwards_stay_eager() -> None:
    eager, compiled = (policy.causal_lm for policy in _policies("Qwen3"))
    ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    before = _compiled_graphs()
    for implementation in (register(), "sdpa", "eager"):
        for model in (eager, compiled):
            model.set_attn_implementation(implementation)
        outputs = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (eager, compiled)]
        assert torch.equal(*outputs)
        assert torch.equal(eager(input_ids=ids).logits, compiled(input_ids=ids).logits)
    assert _compiled_graphs() == before


def test_weights_save_under_their_names_load_back_and_keep_their_ties(tmp_path: Any) -> None:
    policies = _policies("Qwen3", tied=True)
    eager, compiled = (policy.causal_lm for policy in policies)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert compiled.lm_head.weight is compiled.model.embed_tokens.weight
    compiled.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0]) is type(eager.model.layers[0])
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, eager.state_dict()[name])
    with torch.no_grad():
        for model in (eager, compiled):
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    _assert_same(policies, _batch())  # the weights as they stand, not as they were compiled


def test_a_copy_is_compiled_on_weights_of_its_own() -> None:
    policies, batch = _policies("Llama"), _batch()
    references = [Reference(policy) for policy in policies]
    with torch.no_grad():
        for policy in policies:
            policy.causal_lm.model.layers[0].mlp.up_proj.weight.mul_(2)
    layers = policies[1].causal_lm.model.layers
    classes = {type(layer) for layer in layers}
    compile_layers(policies[1].causal_lm, "aot_eager")  # a second time: nothing
    assert references[1].frozen is not None
    assert {type(layer) for layer in [*layers, *references[1].frozen.causal_lm.model.layers]} == classes
    first, second = (reference.logprobs(batch, 1.0)[0] for reference in references)
    assert (first - second).abs().max() <= 1e-6 * first.abs().max()
    assert not torch.allclose(second, policies[1].logprobs(batch, 1.0)[0])
    _assert_same(policies, batch)


def test_a_model_without_layers_to_compile_is_refused() -> None:
    class Whole(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="torch_compile: the layers of Whole cannot be told"):
        compile_layers(Whole())
