"""Model families: packed, with and without shared prompts, against each sequence alone through the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from float64 import float64_throughout

from fastgrpo.config import GRPOConfig
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, attention, load_policy
from fastgrpo.policy.attention import register
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
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 8, **_MOE}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "mistral-window": ("Mistral", {"sliding_window": 4}),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.4}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25, "sliding_window": 4}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "gpt_neox": ("GPTNeoX", {}),
}
# On the CPU; a GPU's flash attention has no window over shared prompts either.
_PLAIN = {"gemma2": "softcap: the CPU's flash attention has none"}
_GROUPS = [(5, [4, 1, 7, 3]), (1, [6, 2]), (8, [5]), (3, [2, 2, 9])]


def _model(family: str, extra: dict[str, Any], dtype: torch.dtype) -> Any:
    kind = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}.get(family, family)
    config = getattr(transformers, f"{kind}Config")(**{**_SMALL, **extra}, initializer_range=0.2)
    config._experts_implementation = "eager"  # torch has no grouped matrix product in float64
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()


def _policy(name: str, dtype: torch.dtype = torch.float32) -> Policy:
    model = _model(*_FAMILIES[name], dtype)
    model.set_attn_implementation(register())
    return Policy(model, None)


def _rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for g, (prompt_length, lengths) in enumerate(_GROUPS):
        prompt = Prompt(g, "", torch.randint(3, 61, (prompt_length,), generator=generator).tolist())
        for c in lengths:
            ids = torch.randint(3, 61, (c,), generator=generator).tolist()
            made.append(Rollout(prompt, g, ids, torch.zeros(c), finished=True, reward=1.0))
    return made


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", sorted(_FAMILIES))
def test_logits_and_gradients_are_those_of_each_sequence_alone(
    name: str, dtype: torch.dtype, tolerance: float, share: bool
) -> None:
    policy, stock = _policy(name, dtype), _model(*_FAMILIES[name], dtype)
    stock.set_attn_implementation("eager")  # the only one that knows every family's scores
    policy.self_check()
    assert policy.unshared == _PLAIN.get(name)
    rollouts = _rollouts()
    [batch] = pack(rollouts, max_tokens=1000, share=share and policy.shares)
    assert batch.layout.shares == (share and policy.shares)
    with float64_throughout():
        packed = policy.head.logits(policy.hidden(batch))
        alone = []
        for r in (rollouts[m] for m in batch.members):
            ids = torch.tensor([*r.prompt.token_ids, *r.token_ids])
            alone.append(stock(input_ids=ids[None], use_cache=False).logits[0, len(r.prompt.token_ids) - 1 : -1])
        expected = torch.cat(alone)
        assert packed.dtype == expected.dtype == dtype
        assert (packed - expected).abs().max() <= tolerance * expected.abs().max()
        direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        (packed * direction).sum().backward()
        (expected * direction).sum().backward()
    largest = max(p.grad.abs().max() for p in stock.parameters() if p.grad is not None)
    for (n, p), q in zip(policy.model.named_parameters(), stock.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, n
        else:
            assert (p.grad - q.grad).abs().max() <= tolerance * largest, n


_NO_WINDOW = "no window for this test"


@pytest.fixture
def no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose flash attention has no window over shared prompts."""

    def refuse(_: Any, layout: PackedLayout, *, window: int | None, softcap: float | None) -> str | None:
        assert window is None or window < layout.longest  # else the op would not look at it
        return _NO_WINDOW if window is not None else None

    monkeypatch.setattr(attention, "why_not_flash", refuse)


@pytest.mark.usefixtures("no_windows")
@pytest.mark.parametrize("name", ["gemma3", "mistral-window", "cohere2"])
def test_a_window_that_cuts_sequences_is_packed_plainly(name: str) -> None:
    policy = _policy(name)
    policy.self_check()
    assert policy.unshared == _NO_WINDOW
    [batch] = pack(_rollouts(), max_tokens=1000, share=True)
    with pytest.raises(attention.CannotShareError, match=f"set share_prompts to false.*{_NO_WINDOW}"):
        policy.hidden(batch)


@pytest.mark.usefixtures("no_windows")
@pytest.mark.parametrize("family", ["Gemma3", "Mistral", "Cohere2"])
def test_a_window_as_long_as_every_sequence_shares(family: str) -> None:
    model = _model(family, {"head_dim": 8, "sliding_window": 30}, torch.float32)
    model.set_attn_implementation(register())
    policy = Policy(model, None)
    policy.self_check(longest=30)
    assert policy.shares
    policy.self_check(longest=31)
    assert policy.unshared == _NO_WINDOW
    policy.self_check(longest=30, share_prompts=False)
    assert policy.unshared == "share_prompts is off"


_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("Mamba", {"state_size": 4}, "cannot run packed sequences|other logits"),
    "falcon-h1": (
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "head_dim": 8},
        "other logits than the model's own forward",
    ),
    "qwen3-next": ("Qwen3Next", {"head_dim": 8, **_MOE, **_LINEAR}, "other logits|linear_attention"),
    "phi3-longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 16,
            },
        },
        "decides every one's rotations beyond 16 tokens",
    ),
    "llama-dynamic": (
        "Llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
        "decides every one's rotations beyond 16 tokens",
    ),
    "llama4-temperature": (
        "Llama4",
        {"head_dim": 8, "attention_chunk_size": 999, "num_local_experts": 2, "no_rope_layers": [1, 0]},
        "scales attention by a row's place in the row",
    ),
    "llama4": ("Llama4", {"head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2}, "in chunks of 16 tokens"),
    "gpt-oss": ("GptOss", {"head_dim": 8, "num_local_experts": 2}, r"uses \['s_aux'\]"),
    "phimoe": ("Phimoe", {"sliding_window": 16, "num_local_experts": 2}, "sliding window of 16 tokens is in its masks"),
}


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_what_cannot_be_packed_is_refused_with_the_reason(name: str) -> None:
    family, extra, reason = _REFUSED[name]
    model = _model(family, extra, torch.float32)
    model.set_attn_implementation(register())
    with pytest.raises(ValueError, match=reason):
        Policy(model, None).self_check(longest=64)


@pytest.mark.parametrize(("name", "limit"), [("llama4", 16), ("phi3-longrope", 16), ("llama-dynamic", 16)])
def test_within_its_limit_it_is_packed(name: str, limit: int) -> None:
    family, extra, reason = _REFUSED[name]
    model = _model(family, extra, torch.float32)
    model.set_attn_implementation(register())
    policy = Policy(model, None)
    policy.self_check(longest=limit)
    with pytest.raises(ValueError, match=reason):
        policy.self_check(longest=limit + 1)


@pytest.mark.parametrize(
    ("family", "extra"),
    [("Phi3", {"resid_pdrop": 0.1}), ("GPTNeoX", {"hidden_dropout": 0.1}), ("Phimoe", {"num_local_experts": 2})],
)
def test_a_model_that_trains_another_function_than_it_samples_is_refused(family: str, extra: dict[str, Any]) -> None:
    model = _model(family, extra, torch.float32)
    model.set_attn_implementation(register())
    with pytest.raises(ValueError, match="computes something else while it trains than when it samples"):
        Policy(model, None).self_check(longest=16)


@pytest.mark.parametrize(
    ("family", "extra"),
    [("Phi3", {"resid_pdrop": 0.1}), ("GPTNeoX", {"hidden_dropout": 0.1}), ("Llama", {"attention_dropout": 0.1})],
)
def test_dropout_is_off_in_what_is_loaded(family: str, extra: dict[str, Any], tiny_tokenizer: Any) -> None:
    model = _model(family, {"vocab_size": 105, **extra}, torch.float32)
    policy = load_policy(model, tiny_tokenizer, GRPOConfig())
    assert policy.shares
    [batch] = pack(_rollouts(), max_tokens=1000, share=True)
    states = []
    for training in (False, True):
        with policy.mode(training=training), torch.no_grad():
            states.append(policy.hidden(batch))
    assert torch.equal(*states)
    assert {**model.config.to_dict(), **extra} == model.config.to_dict()  # it is saved with the dropout it came with
