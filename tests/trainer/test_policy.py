"""The packed forward and the LM head against transformers' own forward; loading, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastgrpo.config import GRPOConfig
from fastgrpo.packing import pack
from fastgrpo.policy import Reference, attention, load_policy
from fastgrpo.policy.attention import Packed, packed_attention, register
from fastgrpo.policy.head import describe_head
from fastgrpo.policy.loading import pick_device
from fastgrpo.records import Prompt, Rollout
from fastgrpo_kernels import PackedLayout

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}


def _model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    family, extra = _FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**_SMALL, **extra}, initializer_range=0.2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    model.set_attn_implementation(register())
    return model


def _rollouts(lengths: list[tuple[int, int]], vocab: int = 61) -> list[Rollout]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for i, (p, c) in enumerate(lengths):
        ids = torch.randint(3, vocab, (p + c,), generator=generator).tolist()
        made.append(Rollout(Prompt(i, "", ids[:p]), i, ids[p:], torch.zeros(c), finished=True, reward=1.0))
    return made


_LENGTHS = [(3, 4), (1, 9), (6, 1), (2, 2), (8, 5), (3, 4)]


def test_capped_scores_are_those_of_the_stock_model() -> None:
    ours, stock = _model("gemma2"), _model("gemma2")
    stock.set_attn_implementation("eager")
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=0, atol=2e-6)


def test_perturbing_one_sequence_changes_no_other_bitwise(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    rollouts = _rollouts(_LENGTHS)
    [before] = pack(rollouts, max_tokens=1000)
    rollouts[2].token_ids = [5]
    rollouts[4].token_ids = [6] * 5
    [after] = pack(rollouts, max_tokens=1000)
    first, second = policy.logprobs(before, 1.0)[0], policy.logprobs(after, 1.0)[0]
    sizes = before.cu_seqlens.diff().tolist()
    for i, (a, b) in enumerate(zip(first.split(sizes), second.split(sizes), strict=True)):
        assert torch.equal(a, b) == (i not in (2, 4))


def test_gradient_checkpointing_changes_nothing(tiny_model_dir: Path) -> None:
    [batch] = pack(_rollouts(_LENGTHS), max_tokens=1000)
    gradients, computed = [], []
    for every in (0, 1, 2, 3):
        config = GRPOConfig(gradient_checkpointing=every > 0, gradient_checkpointing_every=max(every, 1))
        policy = load_policy(str(tiny_model_dir), None, config)
        seen: list[str] = []  # by the MLPs, which a recomputation runs again
        for name, module in policy.model.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_pre_hook(lambda *_, seen=seen: seen.append("mlp"))
        with policy.mode(training=True):
            policy.hidden(batch).square().sum().backward()
        gradients.append([p.grad for _, p in policy.trainable()])
        computed.append(len(seen))
    layers = policy.causal_lm.config.num_hidden_layers
    assert computed == [layers] + [layers + math.ceil(layers / every) for every in (1, 2, 3)]
    for checkpointed in gradients[1:]:
        for a, b in zip(gradients[0], checkpointed, strict=True):
            assert torch.equal(a, b)


def test_generation_with_the_registered_attention_is_the_stock_one() -> None:
    for name in ("qwen3", "gemma2"):
        ours = _model(name, torch.float32)
        stock = copy.deepcopy(ours)
        stock.set_attn_implementation("eager")
        ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(3))
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_packed_attention_against_a_dense_mask(
    window: int | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:  # as where no flash attention takes the tensors
        monkeypatch.setattr(attention, "why_not_flash", lambda *_, **__: "for this test")
    lengths = (4, 1, 9, 4, 2)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, total, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, total, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    out = packed_attention(q, k, v, _plain(lengths), sliding_window=window)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i = torch.arange(total)
    visible = (owner[:, None] == owner) & (i[:, None] >= i)
    if window is not None:
        visible &= i[:, None] - i < window
    scores = (q @ k.repeat_interleave(2, 1).mT) / 8**0.5
    dense = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, dense.transpose(1, 2), rtol=0, atol=1e-12)


def test_packed_attention_refuses_what_does_not_add_up() -> None:
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="query has 5 tokens, the layout 4"):
        packed_attention(q, q, q, _plain((2, 2)))


def test_a_batch_that_does_not_add_up_is_refused(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    [batch] = pack(_rollouts(_LENGTHS), max_tokens=1000)
    batch.input_ids = batch.input_ids[:-1]
    with pytest.raises(ValueError, match="47 input_ids, but the layout has 48 tokens"):
        policy.hidden(batch)


def _plain(lengths: tuple[int, ...]) -> Packed:
    return Packed(PackedLayout(lengths, ((),) * len(lengths)))


def test_self_check_refuses_a_head_it_does_not_know(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    original = policy.causal_lm.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    policy.causal_lm.forward = scaled
    with pytest.raises(ValueError, match="packed sequences give other logits"):
        policy.self_check()


def test_head_of_cohere_granite_gemma() -> None:
    assert describe_head(_model("cohere")).logit_scale == 0.25
    assert describe_head(_model("granite")).logit_scale == 0.25
    assert describe_head(_model("gemma2")).softcap == 3.0
    assert describe_head(_model("llama")).softcap is None


def test_reference_is_the_initial_policy_and_moves_when_mixed(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    [batch] = pack(_rollouts(_LENGTHS), max_tokens=1000)
    before = policy.logprobs(batch, 1.0)[0]
    reference = Reference(policy)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.05 * torch.randn_like(p))
    moved = policy.logprobs(batch, 1.0)[0]
    assert torch.equal(reference.logprobs(batch, 1.0)[0], before)
    assert not torch.equal(moved, before)
    reference.mix(1.0)
    assert torch.equal(reference.logprobs(batch, 1.0)[0], moved)


def test_lora_starts_as_the_base_model_and_adapters_off_is_the_reference(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = GRPOConfig(use_peft=True, lora_r=2)
    base = load_policy(str(tiny_model_dir), None, GRPOConfig())
    policy = load_policy(str(tiny_model_dir), None, config)
    [batch] = pack(_rollouts(_LENGTHS), max_tokens=1000)
    expected = base.logprobs(batch, 1.0)[0]
    torch.testing.assert_close(policy.logprobs(batch, 1.0)[0], expected, rtol=0, atol=1e-6)
    assert all("lora" in name for name, _ in policy.trainable())
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.3)
    changed = policy.logprobs(batch, 1.0)[0]
    assert not torch.allclose(changed, expected, atol=1e-3)
    torch.testing.assert_close(Reference(policy).logprobs(batch, 1.0)[0], expected, rtol=0, atol=1e-6)
    policy.save(tmp_path)
    again = load_policy(str(tiny_model_dir), None, config)
    again.load(tmp_path)
    assert torch.equal(again.logprobs(batch, 1.0)[0], changed)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any("lora" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_are_bitwise_and_from_pretrained_reads_the_folder(
    tied: bool, tiny_model_dir: Path, tiny_untied_model_dir: Path, tmp_path: Path
) -> None:
    source = str(tiny_model_dir if tied else tiny_untied_model_dir)
    policy = load_policy(source, None, GRPOConfig())
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(torch.randn_like(p))
    policy.save(tmp_path)
    other = load_policy(source, None, GRPOConfig())
    other.load(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, p), q, s in zip(policy.trainable(), dict(other.trainable()).values(), stock.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p, s), name
    assert (other.head.weight is other.causal_lm.get_input_embeddings().weight) == tied


def test_half_precision_leaves_the_angles_of_rotations_alone(tiny_model_dir: Path) -> None:
    """In bf16 the frequencies would be off by up to a radian at position 1000."""
    exact = load_policy(str(tiny_model_dir), None, GRPOConfig())
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig(dtype="bfloat16"))
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    buffers = dict(exact.model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in policy.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_a_device_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "cuda" is whichever is current; torch refuses to be told so."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda") == torch.device("cuda")
    assert chosen == []
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]


def test_parameters_own_aligned_memory(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    assert all(p.data_ptr() % 64 == 0 for _, p in policy.trainable())


class TestRefusals:
    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"without a config\.json: not a model"):
            load_policy(str(tmp_path), None, GRPOConfig())

    def test_missing_folder(self) -> None:
        with pytest.raises(ValueError, match="no such folder"):
            load_policy("./nowhere", None, GRPOConfig())

    def test_unknown_hub_name_is_one_line(self) -> None:
        with pytest.raises(ValueError, match=r"model='nobody/nothing' cannot be loaded: .+") as caught:
            load_policy("nobody/nothing", None, GRPOConfig())
        assert "\n" not in str(caught.value)

    def test_broken_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_policy(str(tmp_path), None, GRPOConfig())

    def test_vocabulary_mismatch(self, helpers: Any) -> None:
        with pytest.raises(ValueError, match=r"vocabulary mismatch: the tokenizer has 105 tokens.*60 rows"):
            load_policy(helpers.make_model(60), helpers.make_tokenizer(), GRPOConfig())

    def test_not_a_model(self) -> None:
        with pytest.raises(ValueError, match="must be a causal language model"):
            load_policy(torch.nn.Linear(2, 2), "x", GRPOConfig())

    def test_no_such_device(self, tiny_model_dir: Path) -> None:
        with pytest.raises(ValueError, match="device='cuda:77' cannot be used"):
            load_policy(str(tiny_model_dir), None, GRPOConfig(device="cuda:77"))

    def test_neither_cpu_nor_gpu(self, tiny_model_dir: Path) -> None:
        with pytest.raises(ValueError, match="device='meta' cannot be used: only cpu and cuda"):
            load_policy(str(tiny_model_dir), None, GRPOConfig(device="meta"))

    @pytest.mark.parametrize("factory", ["json:__name__", "json:dumps"])
    def test_factories_that_cannot_be_called(self, factory: str) -> None:
        with pytest.raises(ValueError, match="must be a function without arguments"):
            load_policy(factory, None, GRPOConfig())

    def test_a_factory_that_returns_too_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import json

        monkeypatch.setattr(json, "many", lambda: (1, 2, 3), raising=False)
        with pytest.raises(ValueError, match="not 3 things"):
            load_policy("json:many", None, GRPOConfig())

    def test_no_tokenizer(self, helpers: Any, tmp_path: Path) -> None:
        helpers.make_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="give processing_class"):
            load_policy(str(tmp_path), None, GRPOConfig())

    def test_weights_that_are_not_finite(self, helpers: Any) -> None:
        model = helpers.make_model()
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
        with pytest.raises(ValueError, match="Qwen3ForCausalLM gives logits that are not finite"):
            load_policy(model, helpers.make_tokenizer(), GRPOConfig())

    def test_prompt_tuning(self, helpers: Any) -> None:
        from peft import PromptTuningConfig

        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="PromptTuningConfig learns a prompt"):
            load_policy(helpers.make_model(), helpers.make_tokenizer(), GRPOConfig(), config)

    def test_adapters_on_the_head(self, helpers: Any) -> None:
        from peft import LoraConfig

        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
        with pytest.raises(ValueError, match=r"the LM head of Qwen3ForCausalLM is of type peft\..*not one plain"):
            load_policy(helpers.make_model(tie_word_embeddings=False), helpers.make_tokenizer(), GRPOConfig(), config)

    def test_state_space_model(self, helpers: Any) -> None:
        config = transformers.MambaConfig(vocab_size=105, hidden_size=16, num_hidden_layers=1, state_size=4)
        with pytest.raises(ValueError, match="MambaForCausalLM"):
            load_policy(transformers.MambaForCausalLM(config), helpers.make_tokenizer(), GRPOConfig())
