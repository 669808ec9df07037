"""A decoder's forward in few kernels: what transformers computes, where layers are such; refused where they are not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.layers import Attention, StockBody, fuse
from fastgrpo.policy.attention import register
from fastgrpo.policy.storage import own_memory
from fastgrpo.records import Prompt, Sampling
from fastgrpo.rollout.loop import LoopEngine

_SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FUSED: dict[str, Any] = {
    "llama": tf.LlamaConfig(**_SIZES),
    "llama-biases": tf.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama-odd-heads": tf.LlamaConfig(**_SIZES, head_dim=10),
    "qwen2": tf.Qwen2Config(**_SIZES),
    "qwen3": tf.Qwen3Config(**_SIZES, head_dim=32),
    "mistral": tf.MistralConfig(**_SIZES, sliding_window=6),
    "smollm3": tf.SmolLM3Config(**_SIZES, no_rope_layers=[1, 1, 0]),
    "qwen3-moe": tf.Qwen3MoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
_REFUSED: dict[str, tuple[Any, str]] = {
    "granite": (tf.GraniteConfig(**_SIZES, residual_multiplier=0.3), "compute something else"),
    "gemma3": (tf.Gemma3TextConfig(**_SIZES, head_dim=16), "has post_feedforward_layernorm"),
    "olmo2": (tf.Olmo2Config(**_SIZES), "has post_feedforward_layernorm"),
    "phi3": (tf.Phi3Config(**_SIZES), "has qkv_proj"),
    "glm": (tf.GlmConfig(**_SIZES, head_dim=16), "cos: expected shape"),
    "cohere": (tf.CohereConfig(**_SIZES), "its norms are CohereLayerNorm"),
}


def _model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Random weights, norms and biases too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
    model = model.to(dtype).eval()
    model.set_attn_implementation(register())
    own_memory(model)
    return model


def _run(body: Any) -> list[Tensor]:
    """Every layer's queries, keys and values, and logits, all of them and some."""
    ids, positions = torch.arange(9) * 31 % 90, torch.arange(9) * 3
    found = []
    with torch.no_grad():
        for keep in (0, torch.tensor([8, 2])):
            probe = Attention()
            found += [body(probe, ids, positions, keep), *probe.seen]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _FUSED)
def test_the_same_numbers_as_the_stock_forward(name: str, dtype: torch.dtype) -> None:
    model = _model(_FUSED[name], dtype)
    body, reason = fuse(model)
    assert reason is None
    for mine, theirs in zip(_run(body), _run(StockBody(model)), strict=True):
        # One product for three may add up in another order; all else rounds as transformers does.
        bound = 1e-6 if dtype == torch.float32 else 2e-2
        assert (mine - theirs).norm() <= bound * theirs.norm()


class _Calls(TorchDispatchMode):
    """What reaches the device: neither views nor empty memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.names[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def _calls_of_a_layer(config: Any, change: Callable[[Any], Any] = lambda model: model) -> Counter[str]:
    """The calls of three layers less those of two."""
    counted = []
    for layers in (2, 3):
        model = change(_model(type(config)(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})))
        body, _ = fuse(model)
        assert body is not None

        def attend(module: Any, query: Tensor, *_: Any, **__: Any) -> Tensor:
            return query.transpose(1, 2)

        with torch.no_grad(), _Calls() as calls:
            body(attend, torch.arange(4), torch.arange(4))
        counted.append(calls.names)
    return counted[1] - counted[0]


def test_a_layer_is_four_products_and_four_kernels() -> None:
    own = {"add_rms_norm": 2, "rotate_heads": 1, "swiglu": 1}
    llama, biased = (_calls_of_a_layer(_FUSED[name]) for name in ("llama", "qwen2"))
    assert llama == Counter({"mm": 4} | own)
    assert biased == Counter({"mm": 3, "addmm": 1} | own)


def test_weights_that_lie_apart_are_products_of_their_own() -> None:
    def apart(model: Any) -> Any:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    assert _calls_of_a_layer(_FUSED["llama"], apart)["mm"] == 7


def test_it_is_of_the_weights_that_the_model_has_now() -> None:
    model = _model(_FUSED["qwen2"])
    body, _ = fuse(model)
    before = _run(body)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = _run(body)[0]
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed, _run(StockBody(model))[0])
    model.double()  # other memory, in which nothing lies side by side
    torch.testing.assert_close(_run(body)[0], _run(StockBody(model))[0])


def test_adapters_take_part() -> None:
    peft = pytest.importorskip("peft")
    for target in (["q_proj", "v_proj"], "all-linear"):
        model = peft.get_peft_model(
            _model(_FUSED["qwen2"]), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=target)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        body, reason = fuse(model.eval())
        assert reason is None
        mine, theirs = _run(body)[0], _run(StockBody(model))[0]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(_run(body)[0], theirs)


@pytest.mark.parametrize("name", _REFUSED)
def test_other_layers_run_as_they_are(name: str, tiny_tokenizer: Any) -> None:
    config, why = _REFUSED[name]
    model = _model(config)
    body, reason = fuse(model)
    assert body is None
    assert reason is not None
    assert why in reason
    engine = LoopEngine(model, tiny_tokenizer, batch_size=2)
    (rollout,) = engine.generate([Prompt(0, "", [5, 6, 7])], 1, Sampling(4, 1.0, seed=0))
    assert engine.unfused == reason
    ids = torch.tensor([[5, 6, 7, *rollout.token_ids]])
    with torch.no_grad():
        logprob = model(input_ids=ids, use_cache=False).logits[0, 2:-1].log_softmax(-1)
    expected = logprob.gather(1, ids[0, 3:, None]).squeeze(1)
    torch.testing.assert_close(rollout.sampling_logprob, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["self_attn", "self_attn.q_proj", "mlp", "input_layernorm"])
def test_hooks_are_not_passed_over(where: str) -> None:
    model = _model(_FUSED["llama"])
    module = model.model.layers[1].get_submodule(where)
    called = []
    module.register_forward_hook(lambda *_: called.append(where))
    body, reason = fuse(model)
    if body is None:
        assert reason is not None
        assert "has hooks" in reason
    else:
        called.clear()
        _run(body)
        assert called


def test_the_engine_says_that_layers_are_fused(tiny_tokenizer: Any) -> None:
    engine = LoopEngine(_model(_FUSED["qwen3"]), tiny_tokenizer, batch_size=2)
    assert engine.unfused == "not asked yet"
    engine.generate([Prompt(0, "", [5, 6, 7])], 2, Sampling(4, 1.0, seed=0))
    assert engine.unfused is None


class TestSideBySide:
    def test_weights_of_one_input_follow_one_another(self) -> None:
        config = _FUSED["qwen2"]
        model, layer = _model(config), None
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
                for one, next_one in pairwise(linears):
                    assert one.weight.data_ptr() + one.weight.nbytes == next_one.weight.data_ptr()
        assert layer is not None
        assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
        assert layer.self_attn.q_proj.bias.data_ptr() + 4 * 64 == layer.self_attn.k_proj.bias.data_ptr()

    def test_where_alignment_would_be_lost_each_is_alone(self) -> None:
        model = _model(tf.LlamaConfig(**_SIZES | {"hidden_size": 36, "intermediate_size": 5, "head_dim": 6}))
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        assert attention.q_proj.weight.nbytes % 64 == 0
        assert mlp.gate_proj.weight.nbytes % 64
        assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
        storages = [x.weight.untyped_storage().data_ptr() for x in (mlp.gate_proj, mlp.up_proj)]
        assert len(set(storages)) == 2

    def test_saved_loaded_and_copied_they_are_the_weights_they_were(self, tmp_path: Path) -> None:
        model = _model(_FUSED["qwen2"])
        model.save_pretrained(tmp_path)
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
        copied = copy.deepcopy(model)
        for other in (loaded, copied):
            for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
                assert torch.equal(mine, theirs), name
        size = sum(p.nbytes for p in model.parameters())
        assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 1.1 * size

    def test_a_step_of_one_leaves_its_neighbours(self) -> None:
        model = _model(_FUSED["qwen2"])
        attention = model.model.layers[0].self_attn
        before = [x.weight.detach().clone() for x in (attention.q_proj, attention.k_proj, attention.v_proj)]
        torch.optim.SGD([attention.k_proj.weight], lr=1.0).zero_grad()
        attention.k_proj.weight.grad = torch.ones_like(before[1])
        torch.optim.SGD([attention.k_proj.weight], lr=1.0).step()
        after = [x.weight for x in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, False, True]
