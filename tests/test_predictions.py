"""The cost model: sane, monotone, true to what it counts; the page holds what it says; the suite carries it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import predict_head, predict_rollout, predict_update, predictions
from benchmarks.gpu.head_cases import SIZES
from benchmarks.gpu.machine import H200, exp_gemm, gemm
from benchmarks.gpu.update_cases import SHAPES, make_model
from benchmarks.small_model import Shape
from fastgrpo.layers import fuse
from fastgrpo.policy.attention import Packed, no_mask, register
from fastgrpo.policy.fusion import fuse_layers
from fastgrpo.policy.storage import own_memory
from fastgrpo.policy.work import describe_work
from fastgrpo_kernels import PackedLayout
from fastgrpo_kernels.head.plan import DEVICE_GRADIENTS, DEVICE_GRADIENTS_FROZEN, DEVICE_LOGITS

_PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_N = 32768


@pytest.mark.parametrize("page", ["missing.md", "page.md"])
def test_a_page_without_markers_stays_as_it_is(page: str, tmp_path: Path) -> None:
    """One line, exit code 2: as of every command of the benchmarks."""
    pytest.importorskip("triton", reason="the space of configurations is of Triton's kernels")
    (tmp_path / "page.md").write_text("words\n")
    arguments = [sys.executable, "-m", "benchmarks.gpu.predictions", "--write", str(tmp_path / page)]
    done = subprocess.run(arguments, cwd=_PAGE.parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert ("no markers of required" if page == "page.md" else "missing.md") in line
    assert (tmp_path / "page.md").read_text() == "words\n"


def test_the_page_is_what_the_command_writes() -> None:
    pytest.importorskip("triton", reason="the space of configurations is of Triton's kernels")
    assert predictions.written(_PAGE.read_text()) == _PAGE.read_text()


def test_every_required_figure_has_a_ratio() -> None:
    found = list(predictions.figures())
    assert len({f.name for f in found}) == len(found)
    assert all(f.predicted.compared for f in found)


def test_a_large_product_takes_what_was_measured() -> None:
    assert 770e12 < 2 * 8192**3 / gemm(H200, 8192, 8192, 8192) < 800e12


@pytest.mark.parametrize(("D", "V"), SIZES)
def test_the_default_head_is_the_fastest_schedule(D: int, V: int) -> None:
    """The planner's cost model and this one are of one mind, to 2 %."""
    for trainable in (True, False):
        p: dict[str, Any] = {"N": _N, "D": D, "V": V, "trainable": trainable}
        default = predict_head.head(H200, p).ms
        others = [predict_head.head(H200, {**p, "schedule": x}).ms for x in ("epilogue", "single_read", "two_read")]
        assert default <= 1.02 * min(others)
        assert predict_head.head(H200, {**p, "schedule": "recomputed"}).ms > 1.25 * default


def test_the_head_is_near_its_three_products() -> None:
    """1.07 to 1.12 x the three GEMMs alone, the traffic of dW not among them."""
    D, V = 4096, 128256
    parts, limit = predict_head.head_seconds(H200, _N, D, V, True)
    assert 1.07 < sum(parts.values()) / (limit - parts["dW traffic"]) < 1.12
    assert limit > 3 * 2 * _N * D * V / H200.peak


def test_the_head_s_memory_is_its_budget_and_its_gradients() -> None:
    for D, V in SIZES:
        trainable, frozen = (predict_head.peak_bytes(_N, D, V, trainable) for trainable in (True, False))
        assert DEVICE_GRADIENTS < trainable < DEVICE_GRADIENTS + DEVICE_LOGITS + 4 * V * D + 4 * _N * D
        assert DEVICE_GRADIENTS_FROZEN / 2 < frozen < DEVICE_GRADIENTS_FROZEN + DEVICE_LOGITS + 4 * _N * D


def test_twice_the_rows_take_about_twice_the_time() -> None:
    for D, V in SIZES:
        one, two = (predict_head.head_seconds(H200, n * _N, D, V, True)[0] for n in (1, 2))
        assert sum(two.values()) / sum(one.values()) == pytest.approx(2, rel=0.05)


def test_more_work_takes_longer() -> None:
    for size in (1, 100, 5000):
        assert gemm(H200, size, 896, 896) <= gemm(H200, 2 * size, 896, 896) <= gemm(H200, 2 * size, 896, 1792)
        assert exp_gemm(H200, size, 520, 896) < exp_gemm(H200, size, 520, 1792)
    for s in SHAPES:
        steps = [predict_rollout.steady(H200, {"model": s.name, "rows": n, "length": 640}) for n in (1, 64, 512, 1024)]
        assert [x.ms for x in steps] == sorted(x.ms for x in steps)
        assert all(x.limit and x.limit < x.ms for x in steps)


def test_a_faster_machine_is_never_slower() -> None:
    p = {"model": SHAPES[0].name, "lengths": "prompt1024", "prompts": 16}
    usual = predict_update.ours(H200, p).ms
    faster = {"gemm_rate": 1e15, "copy": 6e12, "node": 1e-6, "eager": 0.95, "attention": (5e14, 5e14), "merge": 5}
    for name, number in faster.items():
        assert predict_update.ours(replace(H200, **{name: number}), p).ms < usual, name


def test_every_token_of_a_rollout_becomes_text_once() -> None:
    p = {"model": SHAPES[0].name, "prompts": 64, "n": 16, "length": 128, "mean": 300.0, "longest": 1024}
    tokens = [predict_rollout.ended_tokens(p, done) for done in range(-8, 1024, 8)]
    assert tokens[0] == 0
    assert sum(tokens) == pytest.approx(64 * 16 * predict_rollout.mean_length(p), rel=0.01)


def test_texts_cost_what_the_device_does_not_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    p = {"model": SHAPES[0].name, "prompts": 64, "n": 16, "length": 128, "mean": 300.0, "longest": 1024}
    usual = predict_rollout.generate(H200, p).parts
    monkeypatch.setattr(predict_rollout, "TOKEN_TEXT", 2 * predict_rollout.TOKEN_TEXT)
    slower = predict_rollout.generate(H200, p).parts
    assert slower["host"] == usual["host"]  # all but those of the last burst are hidden
    assert 1.5 < slower["text"] / usual["text"] < 2
    monkeypatch.setattr(predict_rollout, "TOKEN_TEXT", 1.0)
    hours = predict_rollout.generate(H200, p)
    assert hours.ms == pytest.approx(1e3 * 64 * 16 * predict_rollout.mean_length(p), rel=0.01)


def test_fused_layers_and_fewer_tokens_take_less() -> None:
    p = {"model": SHAPES[1].name, "lengths": "gsm8k", "prompts": 64}
    eager, compiled = (predict_update.mfu(H200, {**p, "body": body}) for body in ("eager", "torch_compile"))
    assert eager.ratio is not None
    assert compiled.ratio is not None
    assert eager.ratio < compiled.ratio < 0.8
    shared, ideal = predict_update.sharing(H200, p)
    assert shared.ratio is not None
    assert 1 < shared.ratio < 1.2 * ideal
    assert predict_update.dead_groups(H200, p).ratio == pytest.approx(1.9, abs=0.15)


class _Passes(TorchDispatchMode):
    """Bytes and calls of what is neither a view, nor a matrix product, nor attention; `skipped` by parts of names."""

    def __init__(self, *skipped: str) -> None:
        super().__init__()
        self.skipped = ("mm", "empty", *skipped)
        self.bytes, self.calls = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        is_view = all(x.untyped_storage().data_ptr() in storages for x in made) and "copy_" not in str(func)
        if not is_view and not any(name in str(func) for name in self.skipped):
            self.bytes += sum(_distinct(x) * x.element_size() for x in tensors)
            self.calls[str(func)] += 1
        return out


def _distinct(x: torch.Tensor) -> int:
    """Elements in memory: what is expanded lies there once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


def _counted(s: Shape, tokens: int, body: str) -> list[tuple[float, int]]:
    """(bytes of a token, calls), forward and backward."""
    model = make_model(s, torch.device("cpu"), torch.bfloat16)
    model.set_attn_implementation(register())
    if body == "fused":
        assert fuse_layers(model) is None
    layout = PackedLayout([tokens // 2], [[tokens // 4] * 2])
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    options = {"attention_mask": no_mask(torch.device("cpu")), "use_cache": False, "packed": Packed(layout)}
    with _Passes("attention") as forward:
        out = model.model(input_ids=ids, position_ids=layout.position_ids[None], **options).last_hidden_state
    with _Passes("attention") as backward:
        out.backward(torch.ones_like(out))
    return [(x.bytes / tokens, x.calls.total()) for x in (forward, backward)]


@pytest.mark.parametrize("body", ["eager", "fused"])
def test_layers_move_the_bytes_that_are_counted(body: str) -> None:
    """A layer's: the difference of three layers and two, at PyTorch's dispatcher."""
    s = Shape("counted", 64, width=96, feed_forward=256, layers=2, heads=6, kv_heads=2, head_dim=16)
    two, three = _counted(s, 128, body), _counted(replace(s, layers=3), 128, body)
    layers = predict_update.LAYERS[body]
    sizes = (s.width, s.feed_forward, (s.heads + s.kv_heads) * s.head_dim)
    said = (layers.forward, layers.backward)
    for i, (some, more) in enumerate(zip(two, three, strict=True)):
        formula = sum(a * b for a, b in zip(said[i], sizes, strict=True))
        assert more[0] - some[0] == pytest.approx(formula, rel=0.03)
        assert more[1] - some[1] == layers.kernels[i]


def _counted_decoding(s: Shape, tokens: int) -> tuple[float, int]:
    """(bytes of a token, calls), attention left out."""
    model = make_model(s, torch.device("cpu"), torch.bfloat16)
    model.set_attn_implementation(register())
    own_memory(model)
    body, reason = fuse(model)
    assert body is not None, reason
    ids = torch.zeros(tokens, dtype=torch.int64)
    with torch.no_grad(), _Passes() as passes:
        body(lambda module, query, key, value, **_: query.transpose(1, 2), ids, ids)
    return passes.bytes / tokens, passes.calls.total()


def test_decoding_layers_move_the_bytes_that_are_counted() -> None:
    s = Shape("counted", 64, width=96, feed_forward=256, layers=2, heads=6, kv_heads=2, head_dim=16)
    two, three = _counted_decoding(s, 128), _counted_decoding(replace(s, layers=3), 128)
    layers = predict_update.DECODING
    formula = sum(a * b for a, b in zip(layers.forward, (96, 256, 8 * 16), strict=True))
    assert three[0] - two[0] == pytest.approx(formula, rel=0.03)
    assert three[1] - two[1] == layers.kernels[0]


def test_the_work_is_the_model_s() -> None:
    s = Shape("counted", 64, width=96, feed_forward=256, layers=2, heads=6, kv_heads=2, head_dim=16)
    model = make_model(s, torch.device("cpu"), torch.float32)
    assert predict_update.work_of(s) == describe_work(model)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert predict_update.parameters(s) == sum(p.numel() for p in model.parameters()) - vectors
