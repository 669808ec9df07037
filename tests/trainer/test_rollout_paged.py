"""The loop engine's GPU path, all but the kernel and the capture: pages, page tables, bursts, static batches.

Flash attention is stood in for by plain arithmetic that reads the same arguments as strictly as the kernel does, and
pages hold 4 tokens, so that prompts and completions span many. The real kernel and CUDA graphs need a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine, burst, paged
from fastgrpo.rollout.loop import engine as loop_engine
from fastgrpo.rollout.loop.cache import Group, Row
from fastgrpo.rollout.loop.slabs import KeyShape

_PAGE = 4


def _varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, one sequence at a time; queries end where keys do."""
    assert query.is_contiguous()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[-2])
    assert int(cu_seq_q[-1]) == len(query)
    out = torch.full_like(query, float("nan"))
    for i, (start, stop) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        assert 0 < stop - start <= max_q
        if block_table is None:
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        else:
            assert seqused_k is not None
            assert block_table.dtype == seqused_k.dtype == torch.int32
            assert block_table.shape[1] * key.shape[1] == max_k
            assert 0 < seqused_k[i] <= max_k
            k, v = (x[block_table[i].long()].flatten(0, 1)[: seqused_k[i]] for x in (key, value))
        assert len(k) <= max_k
        repeat = query.shape[1] // key.shape[-2]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], k) * (scale or query.shape[-1] ** -0.5)
        ahead = torch.arange(stop - start)[:, None] + len(k) - (stop - start) - torch.arange(len(k))
        left, right = window_size
        hidden = ((ahead > left) if left >= 0 else ahead < -(10**9)) | (
            (-ahead > right) if right >= 0 else ahead < -(10**9)
        )
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return out


@pytest.fixture(autouse=True)
def _pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages and the stand-in; short bursts, so that rows end in the middle of one and between two."""
    for module in (paged, burst):
        monkeypatch.setattr(module, "PAGE", _PAGE)
    for module in (loop_engine, burst):
        monkeypatch.setattr(module, "BURST", 3)
    monkeypatch.setattr(loop_engine, "why_not_paged", lambda shape: None)
    monkeypatch.setattr(loop_engine, "varlen_attn", lambda: _varlen_attn)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return load_policy(str(tiny_model_dir), None, GRPOConfig())


def _prompts(policy: Policy, *texts: str) -> list[Prompt]:
    return [Prompt(i, t, policy.tokenizer(t).input_ids) for i, t in enumerate(texts)]


def _engine(policy: Policy, batch_size: int) -> LoopEngine:
    return LoopEngine(policy.model, policy.tokenizer, batch_size=batch_size)


def _assert_true_logprobs(policy: Policy, rollouts: list[Rollout], temperature: float = 1.0) -> None:
    for batch in pack(rollouts, max_tokens=1000):
        expected = policy.logprobs(batch, temperature)[0]
        torch.testing.assert_close(batch.sampling_logprob, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_same_tokens_as_over_slabs(policy: Policy, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = _prompts(policy, "ab", "abc", "abcd", "x" * 15, "y" * 33)
    sampling = Sampling(21, 1.4, seed=3, stop_token_ids=(5, 6, 7, 8))
    engine = _engine(policy, batch_size)
    rollouts = engine.generate(prompts, 6, sampling)
    assert engine.reason is None
    assert engine.unpaged is None
    assert engine.uncaptured == "CUDA graphs are for NVIDIA GPUs"
    assert len({r.num_tokens for r in rollouts}) > 5
    _assert_true_logprobs(policy, rollouts, 1.4)
    monkeypatch.setattr(loop_engine, "why_not_paged", lambda shape: "not now")
    plain = _engine(policy, batch_size)
    assert [r.token_ids for r in plain.generate(prompts, 6, sampling)] == [r.token_ids for r in rollouts]
    assert plain.unpaged == "not now"


def test_limits_within_a_burst(policy: Policy) -> None:
    for max_tokens in (1, 2, 3, 4, 5):
        rollouts = _engine(policy, 4).generate(_prompts(policy, "abc", "d"), 3, Sampling(max_tokens, seed=1))
        assert all(r.num_tokens == max_tokens or r.finished for r in rollouts)
        _assert_true_logprobs(policy, rollouts)


def test_a_seed_repeats_bit_for_bit(policy: Policy) -> None:
    prompts = _prompts(policy, "ab", "cdefg")
    first, again = (_engine(policy, 5).generate(prompts, 4, Sampling(12, seed=2)) for _ in range(2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert all(torch.equal(a.sampling_logprob, b.sampling_logprob) for a, b in zip(first, again, strict=True))


def test_prompts_wait_for_pages(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt's pages at a time: slots stay empty rather than pages being taken twice."""
    monkeypatch.setattr(loop_engine, "groups_at_once", lambda rows, n: 1)
    prompts = _prompts(policy, *("z" * n for n in (9, 9, 8, 9, 7, 9)))
    rollouts = _engine(policy, 8).generate(prompts, 3, Sampling(9, 1.4, seed=1, stop_token_ids=(5, 6, 7, 8)))
    _assert_true_logprobs(policy, rollouts, 1.4)


def test_sliding_windows(tiny_tokenizer: Any) -> None:
    config = tf.MistralConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        sliding_window=6,
        eos_token_id=None,
    )
    from fastgrpo.policy.attention import register

    torch.manual_seed(0)
    model = tf.MistralForCausalLM(config).eval()
    model.set_attn_implementation(register())
    prompts = [Prompt(i, "", [(7 * i + j * j) % 90 for j in range(n)]) for i, n in enumerate((3, 17, 1))]
    engine = LoopEngine(model, tiny_tokenizer, batch_size=4)
    rollouts = engine.generate(prompts, 3, Sampling(14, seed=1))
    assert engine.unpaged is None
    for r in rollouts:
        ids = torch.tensor([r.prompt.token_ids + r.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -r.num_tokens - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[0, -r.num_tokens :, None]).squeeze(1)
        torch.testing.assert_close(r.sampling_logprob, expected, rtol=0, atol=1e-5)


def test_a_kernel_that_disagrees_is_not_used(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_engine, "varlen_attn", lambda: lambda q, *_, **__: q)
    engine = _engine(policy, 4)
    rollouts = engine.generate(_prompts(policy, "ab", "c"), 3, Sampling(6))
    assert engine.unpaged is not None
    assert "differ from a full forward's" in engine.unpaged
    _assert_true_logprobs(policy, rollouts)


def test_a_kernel_that_fails_is_not_used(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(loop_engine, "varlen_attn", lambda: broken)
    engine = _engine(policy, 4)
    rollouts = engine.generate(_prompts(policy, "ab", "c"), 3, Sampling(6))
    assert engine.unpaged == "RuntimeError: no kernel image"
    _assert_true_logprobs(policy, rollouts)


def test_what_paged_attention_is_not_for() -> None:
    shape = KeyShape(2, 2, 64, torch.bfloat16, torch.device("cpu"))
    assert "not cpu" in str(paged.why_not_paged(shape))
    for size, dtype in ((60, torch.bfloat16), (512, torch.bfloat16), (64, torch.float32)):
        on_gpu = KeyShape(2, 2, size, dtype, torch.device("cuda"))
        assert "half precision and heads" in str(paged.why_not_paged(on_gpu))
    known = paged.why_not_paged(KeyShape(2, 2, 64, torch.bfloat16, torch.device("cuda")))
    assert known is None or "varlen_attn" in known


def test_pytorchs_own_attention_takes_these_arguments() -> None:
    """Its shape function, not its kernel: names, dtypes and shapes of the call, decoding rows and a prompt at once."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = KeyShape(1, 2, 8, torch.bfloat16, torch.device("cpu"))
    if paged.why_not_paged(dataclasses.replace(shape, device=torch.device("cuda"))):
        pytest.skip("this PyTorch has no paged attention")
    group = Group(token_ids=[1, 2, 3, 4, 5])
    with FakeTensorMode():
        cache = paged.PagedCache(
            shape, rows=2, groups=2, longest_prompt=5, longest_completion=3, attention=paged.varlen_attn()
        )
        first = Group(token_ids=[6, 7])
        cache.add_prompts([first])
        for slot in range(2):
            cache.add_row(Row(group=first, slot=slot))
        cache.add_prompts([group])
        step = cache.step([group])
        q, k = (torch.zeros(1, heads, 7, 8, dtype=torch.bfloat16) for heads in (4, 2))
        for window in (None, 3):
            out = step(SimpleNamespace(layer_idx=0), q, k, k, scaling=0.3, sliding_window=window)  # type: ignore[arg-type]
            assert out.shape == (1, 7, 4, 8)
