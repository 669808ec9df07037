"""Compiled decoder layers: the eager ones' numbers, one compilation for all batches, and everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from policy_cases import GROUPS, OTHERS, assert_same, make_batch, two_policies
from torch._dynamo.utils import counters

from fastgrpo.policy import Policy, Reference
from fastgrpo.policy.attention import Packed, register
from fastgrpo.policy.compilation import compile_layers


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _policies(family: str, backend: str = "aot_eager", **options: Any) -> list[Policy]:
    """The same model twice: eager, and compiled."""
    policies = two_policies(family, **options)
    compile_layers(policies[1].causal_lm, backend)
    return policies


def _compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_numbers_are_the_eager_ones_and_one_compilation_serves_all_batches(family: str) -> None:
    policies = _policies(family)
    before = _compiled_graphs()
    policies[1].self_check()
    assert policies[1].shares
    assert_same(policies, make_batch())
    # Around attention, whatever the number of layers: with gradients, without, and one of them anew for the self-check,
    # which also runs in training mode without gradients.
    assert _compiled_graphs() - before == 2 * 4 + 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for groups in [GROUPS, *OTHERS]:
            for share in (True, False):
                assert_same(policies, make_batch(groups, share=share))
    assert _compiled_graphs() - before == 2 * 4 + 1


def test_inductor_gives_the_eager_numbers() -> None:
    policies = _policies("Qwen3", "inductor")
    assert_same(policies, make_batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(policies, make_batch(OTHERS[3]))


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_stays_around_what_is_compiled(every: int) -> None:
    policies, batch = _policies("Qwen3"), make_batch()
    assert_same(policies, batch)
    for policy in policies:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        for i, layer in enumerate(policy.causal_lm.model.layers):
            layer.gradient_checkpointing = i % every == 0
    assert_same(
        policies, batch
    )  # transformers' hook on the embedding asks for its gradients, also where there are none
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(policies, batch)
        for policy in policies:
            packed = Packed(batch.layout)
            packed.windows = []
            with policy.mode(training=True):
                policy.states(batch.input_ids, packed).sum().backward()
            assert len(packed.windows) == 3 + len(range(0, 3, every))  # each layer once, and what is computed again


def test_adapters_train_and_switch_off() -> None:
    policies, batch = _policies("Qwen3", lora=True), make_batch()
    on = policies[0].logprobs(batch, 1.0)[0]
    for _ in range(2):
        assert_same(policies, batch)
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
    assert_same(policies, make_batch())  # the weights as they stand, not as they were compiled


def test_a_copy_is_compiled_on_weights_of_its_own() -> None:
    policies, batch = _policies("Llama"), make_batch()
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
    assert_same(policies, batch)


def test_a_model_without_layers_to_compile_is_refused() -> None:
    class Whole(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="torch_compile: the layers of Whole cannot be told"):
        compile_layers(Whole())
