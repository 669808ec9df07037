"""fastgrpo/policy/memory.py against the tensors that autograd saves, to the byte, and against the allocator."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from fastgrpo.packing import pack
from fastgrpo.policy import Policy
from fastgrpo.policy.attention import register
from fastgrpo.policy.fusion import fuse_layers
from fastgrpo.policy.memory import ActivationMemory, Adapters, activation_memory, can_fuse
from fastgrpo.records import PackedBatch, Prompt, Rollout
from fastgrpo_kernels import vocabulary

# No two widths alike, so that a tensor taken for another one shows.
_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 168,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 40},
    "Qwen2": {},
    "Qwen3": {"hidden_act": "gelu_pytorch_tanh"},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "Phi3": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "Olmo2": {"head_dim": 16},
}
_FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {}),
    "Qwen2": ("Qwen2", {}),
    "SmolLM3": ("SmolLM3", {}),
    "Qwen3": ("Qwen3", {"hidden_act": "silu"}),
    "Qwen3, GELU": ("Qwen3", {}),  # whose MLP stays as it is
}
# (prompt length, completion lengths)
_GROUPS = [(7, [3, 5, 4]), (6, [2, 8]), (1, [6])]


def _config(family: str, **options: Any) -> Any:
    made = getattr(transformers, f"{family}Config")
    return made(vocab_size=40, pad_token_id=0, **(_SIZES | {"num_hidden_layers": 3} | _FAMILIES[family] | options))


def _policy(config: Any, dtype: torch.dtype, every: int) -> Policy:
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    model.set_attn_implementation(register())
    for layer in model.get_decoder().layers[:: every or len(model.get_decoder().layers) + 1]:
        if every:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return Policy(model, None)


def _adapted(policy: Policy, every: int, targets: str | list[str] = "all-linear") -> Policy:
    """LoRA as the trainer makes it: on a model whose checkpointed layers need inputs that require a gradient."""
    peft = pytest.importorskip("peft")
    if every:
        policy.model.enable_input_require_grads()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=targets)
    return Policy(peft.get_peft_model(policy.model, lora).train(), None)


def _fused(policy: Policy) -> Policy:
    assert fuse_layers(policy.model.eval()) is None
    policy.model.train()
    return policy


def _batch(groups: list[tuple[int, list[int]]] = _GROUPS, *, share: bool = True) -> PackedBatch:
    rollouts = []
    for index, (length, completions) in enumerate(groups):
        prompt = Prompt(index, "", [3 + index, *[4] * (length - 1)])
        rollouts += [Rollout(prompt, index, [5] * n, torch.zeros(n), finished=True, reward=1.0) for n in completions]
    [batch] = pack(rollouts, max_tokens=10_000, share=share)
    return batch


class _Saved:
    """Bytes of the distinct storages that a forward keeps alive, parameters and what the layout holds left out."""

    def __init__(self, policy: Policy, batch: PackedBatch) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        left_out = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()  # held, so that no address is used twice
            if storage.data_ptr() not in left_out and tensor.dtype != torch.int32:
                self.storages[storage.data_ptr()] = storage
            return tensor

        decoder = policy.causal_lm.get_decoder()
        self.inputs: list[Tensor] = []
        hooks = [
            # Checkpointed layers keep the table without autograd.
            decoder.rotary_emb.register_forward_hook(lambda _, __, table: [keep(t) for t in table]),
            *[m.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0])) for m in decoder.layers],
        ]
        keep(batch.input_ids)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.hidden = policy.hidden(batch)
        keep(self.hidden)
        for hook in hooks:
            hook.remove()

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def _positions(batch: PackedBatch, every: int) -> int:
    """The op saves the layout's positions; with every layer checkpointed only the layout holds them."""
    return 8 * len(batch.input_ids) if every == 1 else 0


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", _FAMILIES)
def test_the_formula_is_what_autograd_keeps(family: str, dtype: torch.dtype, share: bool, every: int) -> None:
    config, batch = _config(family), _batch(share=share)
    saved = _Saved(_policy(config, dtype, every), batch)
    expected = activation_memory(config, dtype=dtype).kept(
        len(batch.input_ids), num_scored=len(batch.target), checkpoint_every=every
    )
    assert saved.bytes + _positions(batch, every) == expected


@pytest.mark.parametrize("targets", [None, ["k_proj", "v_proj", "qkv_proj", "up_proj"]])
@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Qwen3", "Phi3", "Olmo2"])
def test_with_adapters_too(family: str, dtype: torch.dtype, every: int, targets: list[str] | None) -> None:
    config, batch = _config(family), _batch()
    adapters = Adapters(5, None if targets is None else frozenset(targets))
    saved = _Saved(_adapted(_policy(config, dtype, every), every, targets or "all-linear"), batch)
    expected = activation_memory(config, dtype=dtype, adapters=adapters).kept(
        len(batch.input_ids), num_scored=len(batch.target), checkpoint_every=every
    )
    assert saved.bytes + _positions(batch, every) == expected


@pytest.mark.parametrize(
    "targets", ["none", None, ["k_proj", "v_proj", "up_proj"], ["v_proj", "o_proj", "down_proj", "gate_proj"]]
)
@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", _FUSED)
def test_fused_layers_keep_less(kind: str, dtype: torch.dtype, every: int, targets: Any) -> None:
    family, options = _FUSED[kind]
    config, batch = _config(family, **options), _batch()
    policy, adapters = _policy(config, dtype, every), None
    if targets != "none":
        policy = _adapted(policy, every, targets or "all-linear")
        adapters = Adapters(5, None if targets is None else frozenset(targets))
    saved = _Saved(_fused(policy), batch)
    kept, eager = (
        activation_memory(config, dtype=dtype, adapters=adapters, fused=fused).kept(
            len(batch.input_ids), num_scored=len(batch.target), checkpoint_every=every
        )
        for fused in (True, False)
    )
    assert saved.bytes + _positions(batch, every) == kept
    if adapters is None and every != 1:
        assert kept < eager


@pytest.mark.parametrize("family", _FAMILIES)
def test_the_families_that_fuse_are_those_whose_layers_do(family: str) -> None:
    config = _config(family)
    assert can_fuse(config) == (fuse_layers(_policy(config, torch.float32, 0).model.eval()) is None)


def test_a_fused_layer_in_numbers() -> None:
    """By hand: e * (4 D + 2 (Hq + Hkv) d + 3 F) + 4 Hq, and Qwen3's queries and keys before their norms."""
    sizes = _SIZES | {"hidden_act": "silu"}
    found = [
        activation_memory(made(**sizes), dtype=torch.bfloat16, fused=True).layer
        for made in (transformers.LlamaConfig, transformers.Qwen3Config)
    ]
    llama = 2 * (4 * 96 + 2 * 8 * 24 + 3 * 168) + 4 * 6
    assert found == [llama, llama + 2 * 8 * 24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", _FAMILIES)
def test_what_a_layer_keeps_and_what_its_checkpoint_holds_already(family: str, dtype: torch.dtype) -> None:
    batch, total, memory = _batch(), {}, {}
    for layers in (2, 4):
        config = _config(family, num_hidden_layers=layers)
        memory[layers] = activation_memory(config, dtype=dtype)
        saved = _Saved(_policy(config, dtype, 0), batch)
        total[layers] = saved.bytes
    tokens = len(batch.input_ids)
    assert total[4] - total[2] == 2 * tokens * memory[4].layer
    shared = all(x.untyped_storage().data_ptr() in saved.storages for x in saved.inputs)
    assert memory[4].recomputed == memory[4].layer - (memory[4].checkpoint if shared else 0)
    assert {x.untyped_storage().nbytes() for x in saved.inputs} == {tokens * memory[4].checkpoint}


def _live_bytes(policy: Policy, batch: PackedBatch) -> tuple[int, int, int]:
    """What the allocator holds more than before: between forward and backward, at most, and in a plain forward."""
    policy.hidden(batch).sum().backward()  # gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = policy.hidden(batch).sum()
        with record_function("between"):
            pass
        loss.backward()
        del loss
        with record_function("done"), torch.no_grad():
            policy.hidden(batch)
    live, between, peak, after = 0, 0, 0, 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "between":
            between = live
        elif event.name() == "done":
            backward, after, peak = peak, live, 0
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return between, backward, peak - after


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("width", [200, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Qwen3", "Phi3", "Qwen3, fused"])
def test_the_allocator_agrees(
    kind: str, dtype: torch.dtype, width: int, every: int, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the narrow MLP the peak is in the final norm, unless a layer is recomputed or adapted."""
    family, _, fused = kind.partition(", ")
    sizes = {"hidden_size": 64, "intermediate_size": width, "num_attention_heads": 4, "head_dim": 16}
    options = {"hidden_act": "silu"} if fused else {}
    config = _config(family, max_position_embeddings=1024, **sizes, **options)
    batch = _batch([(300, [200, 180, 190])])
    adapters = Adapters(5) if adapted else None
    memory = activation_memory(config, dtype=dtype, adapters=adapters, on_cpu=True, fused=bool(fused))
    tokens, scored = len(batch.input_ids), len(batch.target)
    policy = _policy(config, dtype, every)
    if adapted:
        policy = _adapted(policy, every)
    if fused:
        _fused(policy)
        # Backwards on a CPU work in blocks, of 2 MB else: as much as all that is here, where kernels need nothing.
        monkeypatch.setattr(vocabulary, "BLOCK_ELEMENTS", 1 << 10)
    # oneDNN packs the factors of a product in 16 bits.
    with torch.backends.mkldnn.flags(enabled=not fused):
        between, peak, forward = _live_bytes(policy, batch)
    assert 0.98 * tokens * memory.forward <= forward <= tokens * memory.forward
    # The sum is there in place of the scored states.
    kept = memory.kept(tokens, num_scored=scored, checkpoint_every=every) - scored * memory.scored_row
    assert between == pytest.approx(kept, rel=0.025 if adapted else 0.02)
    bound = memory.peak(tokens, num_scored=scored, checkpoint_every=every)
    assert 0.95 * bound <= peak <= bound


@pytest.mark.parametrize("targets", [["v_proj", "down_proj"], ["v_proj", "qkv_proj"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Qwen3", "Phi3", "Qwen3, fused"])
def test_a_forward_with_few_adapters(kind: str, dtype: torch.dtype, targets: list[str]) -> None:
    family, _, fused = kind.partition(", ")
    config = _config(
        family, hidden_size=64, intermediate_size=384, num_attention_heads=4, head_dim=16, hidden_act="silu"
    )
    batch = _batch([(30, [20, 18, 12])])
    adapters = Adapters(5, frozenset(targets))
    memory = activation_memory(config, dtype=dtype, adapters=adapters, on_cpu=True, fused=bool(fused))
    policy = _adapted(_policy(config, dtype, 0), 0, targets)
    with torch.backends.mkldnn.flags(enabled=False):
        *_, forward = _live_bytes(_fused(policy) if fused else policy, batch)
    bound = len(batch.input_ids) * memory.forward
    assert 0.98 * bound <= forward <= bound


def test_the_peak_adds_the_layer_that_is_recomputed_last() -> None:
    memory = ActivationMemory(
        layer=100, checkpoint=10, recomputed=90, outside=5, mlp=40, norm=50, scored_row=3, num_layers=4
    )
    kept = [memory.kept(2, num_scored=1, checkpoint_every=k) for k in (0, 1, 2, 3, 9)]
    peak = [memory.peak(2, num_scored=1, checkpoint_every=k) for k in (0, 1, 2, 3, 9)]
    # No layer; all; layers 0 and 2; 0 and 3; 0.
    assert kept == [2 * 405 + 3, 2 * 45 + 3, 2 * 225 + 3, 2 * 225 + 3, 2 * 315 + 3]
    # Recomputed behind all others: where all are checkpointed, and layer 3.
    assert [p - k for p, k in zip(peak, kept, strict=True)] == [2 * 50, 2 * (90 + 40), 2 * 50, 2 * (90 + 40), 2 * 50]
    assert memory.kept(2) == 2 * (405 + 3)


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        (transformers.Gemma2Config(), torch.bfloat16, "what layers of 'gemma2' keep is not"),
        (transformers.Qwen3MoeConfig(), torch.bfloat16, "what layers of 'qwen3_moe' keep is not"),
        (transformers.LlamaConfig(hidden_act="relu"), torch.bfloat16, "what 'relu' keeps is not"),
        (transformers.LlamaConfig(attention_dropout=0.1), torch.bfloat16, "without dropout, got attention_dropout=0.1"),
        (transformers.Phi3Config(resid_pdrop=0.2), torch.bfloat16, "without dropout, got resid_pdrop=0.2"),
        (transformers.LlamaConfig(), torch.float64, r"not for torch\.float64"),
    ],
)
def test_what_is_not_known_is_refused(config: Any, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activation_memory(config, dtype=dtype)


def test_layers_that_are_not_known_to_fuse_are_refused() -> None:
    with pytest.raises(ValueError, match="llama, mistral, qwen2, smollm3, qwen3; those of 'phi3' are not"):
        activation_memory(_config("Phi3"), dtype=torch.float32, fused=True)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"num_scored": 5}, "from 0 to num_tokens = 4, got 5"), ({"checkpoint_every": -1}, "positive, got -1")],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, int], message: str) -> None:
    memory = activation_memory(_config("Qwen2"), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        memory.peak(4, **numbers)
