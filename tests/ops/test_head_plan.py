"""`plan_head` at real sizes: rows covered, memory kept, GEMMs counted, the choice explained and overridden."""

from __future__ import annotations

import dataclasses
import itertools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from fastgrpo_kernels import HeadPlan, LossConfig, linear_grpo_loss, linear_logprob, watch_plans
from fastgrpo_kernels.head import plan as planning
from fastgrpo_kernels.head.operands import HeadOperands
from fastgrpo_kernels.head.plan import HeadProblem, even_windows, head_bytes, plan_head, sequence_windows

SIZES = ((4096, 128256), (2048, 151936), (896, 151936))
N = 32768
SHAPES = pytest.mark.parametrize(("hidden_size", "vocab_size"), SIZES)
BASE = HeadProblem(N, 4096, 128256, torch.bfloat16, True, True, False, "token", True, True)


def problem(**changes: object) -> HeadProblem:
    return dataclasses.replace(BASE, **changes)  # type: ignore[arg-type]


def on_host(**changes: object) -> HeadProblem:
    return problem(**{"dtype": torch.float32, "on_device": False, "tensor_copies": False, **changes})


def sequences(num_rows: int, longest: int = 700) -> list[int]:
    """Boundaries of sequences of changing lengths, empty ones among them."""
    bounds, lengths = [0], itertools.cycle((longest, 1, 0, longest // 2, 0, longest - 3))
    while bounds[-1] < num_rows:
        bounds.append(min(bounds[-1] + next(lengths), num_rows))
    return bounds


def every_problem(num_rows: int) -> list[HeadProblem]:
    """All that a plan can turn on, at the sizes of real heads; what cannot be (trainable, no gradient) left out."""
    found = []
    for (hidden_size, vocab_size), dtype in itertools.product(SIZES, (torch.bfloat16, torch.float16, torch.float32)):
        for trainable, differentiable, entropy, on_device, copies in itertools.product([False, True], repeat=5):
            if ((trainable or entropy) and not differentiable) or (copies and not (on_device and dtype.itemsize == 2)):
                continue
            for reach in ("token", "sequence", "batch", "unknown"):
                flags = (trainable, differentiable, entropy, reach, on_device, copies)
                found.append(HeadProblem(num_rows, hidden_size, vocab_size, dtype, *flags))  # type: ignore[arg-type]
    return found


def check_covers(windows: list[slice], num_rows: int) -> None:
    """Every row once, in order; only N = 0 has an empty window, which it needs for its loss to be evaluated."""
    assert windows[0].start == 0
    assert windows[-1].stop == num_rows
    assert all(a.stop == b.start for a, b in pairwise(windows))
    assert num_rows == 0 or all(window.start < window.stop for window in windows)
    assert num_rows > 0 or len(windows) == 1


@pytest.mark.parametrize("num_rows", [0, 1, 127, 5000, N])
def test_every_plan_covers_the_rows_within_its_chunk(num_rows: int) -> None:
    bounds = sequences(num_rows)
    problems = every_problem(num_rows)
    assert len(problems) > 400
    for one in problems:
        plan = plan_head(one, lambda: bounds)
        check_covers(plan.windows, num_rows)
        widest = max(window.stop - window.start for window in plan.windows)
        assert widest <= plan.chunk_rows or not one.differentiable
        assert plan.method != "two_read" or widest <= plan.logit_rows
        assert (plan.logit_rows == 0) == (plan.method == "epilogue" or num_rows == 0) or plan.method == "single_read"
        if plan.schedule == "fused" and one.reach == "sequence" and len(plan.windows) > 1:
            assert {window.stop for window in plan.windows} <= set(bounds)
        if plan.schedule == "fused":
            assert one.reach != "batch" or len(plan.windows) == 1
            assert one.reach != "unknown"


def test_every_plan_counts_its_gemms() -> None:
    for one in every_problem(N):
        plan = plan_head(one, lambda: sequences(N))
        if plan.schedule == "forward":
            assert plan.gemms == 1
            assert not one.differentiable
        elif plan.schedule == "recomputed":
            assert plan.gemms == (4 if one.trainable else 3)
        else:
            assert plan.gemms == (3 if one.trainable else 2)
        assert plan.schedule != "per_row" or not one.trainable
        frozen = one.differentiable and not one.trainable and not one.entropy_gradient
        assert not frozen or plan.gemms == 2, "a frozen head never computes its logits twice"


def device_bytes(plan: HeadPlan, one: HeadProblem) -> int:
    """What a device holds beyond inputs: gradient rows, fp32 logits, rows padded to 64 columns, the fp32 dW."""
    width = -(-one.vocab_size // 64) * 64
    rows = width * (plan.chunk_rows * one.dtype.itemsize + plan.logit_rows * 4)
    return rows + (4 * one.vocab_size * one.hidden_size if one.trainable else 0)


@SHAPES
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("reach", ["token", "sequence", "batch", "unknown"])
@pytest.mark.parametrize("copies", [True, False])
def test_device_memory_is_as_stated_and_flat_in_the_rows(
    hidden_size: int, vocab_size: int, trainable: bool, entropy: bool, reach: str, copies: bool
) -> None:
    allowed = 6.6e9 if trainable else 1.5e9
    used = []
    for num_rows in (N, 2 * N, 8 * N):
        one = problem(
            num_rows=num_rows, hidden_size=hidden_size, vocab_size=vocab_size, trainable=trainable,
            entropy_gradient=entropy, reach=reach, tensor_copies=copies,
        )  # fmt: skip
        used.append(device_bytes(plan_head(one, lambda n=num_rows: sequences(n)), one))  # type: ignore[misc]
    assert max(used) <= allowed
    assert max(used) - min(used) <= 0.1 * allowed  # windows of equal size are not always the largest possible


@SHAPES
def test_chunk_size_makes_it_smaller(hidden_size: int, vocab_size: int) -> None:
    one = problem(hidden_size=hidden_size, vocab_size=vocab_size)
    for method in ("epilogue", "single_read", "two_read"):
        plans = [plan_head(one, None, size, method) for size in (1024, 2048, 4096)]
        assert [plan.chunk_rows for plan in plans] == [1024, 2048, 4096]
        assert all(max(w.stop - w.start for w in plan.windows) <= plan.chunk_rows for plan in plans)
        assert device_bytes(plans[0], one) < device_bytes(plans[1], one) < device_bytes(plans[2], one)


def test_host_windows_keep_their_budgets() -> None:
    for vocab_size, dtype in itertools.product((1, 32001, 151936), (torch.float32, torch.float64, torch.bfloat16)):
        wide = 8 if dtype == torch.float64 else 4
        for reach in ("token", "sequence", "batch", "unknown"):
            one = on_host(num_rows=5000, vocab_size=vocab_size, dtype=dtype, reach=reach)
            plan = plan_head(one, lambda: sequences(5000, 300))
            budget = planning.HOST_SEQUENCE_LOGITS if reach == "sequence" else planning.HOST_LOGITS
            assert max(w.stop - w.start for w in plan.windows) * vocab_size * wide <= budget


def test_cost_model_chooses_the_cheaper_method() -> None:
    """The epilogue's slower GEMM, linear in D, against one pass over the logits, which is not."""
    methods = [plan_head(problem(hidden_size=d)).method for d in (512, 896, 2048, 8192, 16384)]
    assert methods == ["epilogue"] * 3 + ["single_read"] * 2
    assert plan_head(problem(hidden_size=16384, trainable=False, differentiable=False)).method == "epilogue"
    for changes, method in (
        ({"tensor_copies": False}, "single_read"),
        ({"entropy_gradient": True}, "two_read"),
        ({"dtype": torch.float16}, "two_read"),
        ({"dtype": torch.float32, "tensor_copies": False}, "two_read"),
    ):
        assert plan_head(problem(hidden_size=896, **changes)).method == method
    assert plan_head(on_host()).method == "two_read"


@pytest.mark.parametrize("reach", ["token", "sequence", "batch"])
def test_schedules_asked_for(reach: str) -> None:
    one = problem(reach=reach, num_rows=2048)
    for method in ("epilogue", "single_read", "two_read"):
        plan = plan_head(one, lambda: sequences(2048), None, method)
        assert plan.method == method
        assert plan.reason.startswith(f"{method}: asked for")
    for bounds in (None, lambda: sequences(2048)):
        plan = plan_head(one, bounds, None, "recomputed")
        assert (plan.schedule, plan.gemms) == ("recomputed", 4)
        assert plan.reason.endswith("recomputed: asked for")
    assert plan_head(on_host(reach=reach), None, None, "recomputed").schedule == "recomputed"
    assert plan_head(problem(trainable=False, differentiable=False), None, None, "recomputed").schedule == "forward"


def test_schedules_that_cannot_be_had() -> None:
    for method in ("epilogue", "single_read"):
        with pytest.raises(ValueError, match="schedule: expected two_read, recomputed or None without a GPU, got"):
            plan_head(on_host(), None, None, method)
        for changes in ({"entropy_gradient": True}, {"dtype": torch.float16}):
            with pytest.raises(ValueError, match=f"schedule: expected two_read or recomputed .* got '{method}'"):
                plan_head(problem(**changes), None, None, method)
    with pytest.raises(ValueError, match="schedule: expected another than 'epilogue', which needs bf16 rows"):
        plan_head(problem(tensor_copies=False), None, None, "epilogue")
    hidden, weight, target = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="schedule: expected two_read, recomputed or None without a GPU"):
        linear_logprob(hidden, weight, target, schedule="epilogue")
    with pytest.raises(ValueError, match="schedule: expected one of epilogue, single_read, two_read, recomputed, got"):
        linear_logprob(hidden, weight, target, schedule="fast")  # type: ignore[arg-type]


def test_reasons_for_a_schedule() -> None:
    for changes, schedule, reason in (
        ({"differentiable": False, "trainable": False}, "forward", "no gradient is wanted"),
        ({"num_rows": 9, "reach": "batch"}, "fused", "all rows fit a window"),
        ({}, "fused", "a token's gradient depends on itself"),
        ({"reach": "sequence"}, "fused", "every sequence fits a window"),
        ({"reach": "batch"}, "recomputed", "the gradient depends on all rows, which exceed a window"),
        ({"reach": "batch", "trainable": False}, "per_row", "the weight is frozen"),
        ({"reach": "unknown"}, "recomputed", "the loss is not known here"),
        ({"reach": "unknown", "trainable": False}, "per_row", "the weight is frozen"),
    ):
        plan = plan_head(problem(**changes), lambda: sequences(N))
        assert plan.schedule == schedule
        assert plan.reason.endswith(f"{schedule}: {reason}")
    assert plan_head(problem(reach="sequence"), None).reason.endswith("boundaries cannot be read now")


def test_boundaries_are_read_only_where_a_plan_turns_on_them() -> None:
    def refuse() -> list[int]:
        raise AssertionError("this waits for the device")

    for one in (*every_problem(1), *every_problem(N)):
        if one.reach != "sequence" or not (one.trainable or one.entropy_gradient) or one.num_rows == 1:
            plan_head(one, refuse)
    with pytest.raises(AssertionError):
        plan_head(problem(reach="sequence"), refuse)


def test_one_sequence_longer_than_everything() -> None:
    for one in (problem(reach="sequence"), on_host(reach="sequence")):
        plan = plan_head(one, lambda: [0, 0, N])
        assert (plan.schedule, plan.gemms) == ("recomputed", 4)
        assert f"a sequence of {N} tokens exceeds a window of" in plan.reason
        assert len(plan.windows) > 1
        frozen = plan_head(dataclasses.replace(one, trainable=False), lambda: [0, 0, N])
        assert (frozen.schedule, frozen.gemms) == ("per_row", 2)
    grown = plan_head(on_host(reach="sequence", num_rows=900, vocab_size=151936), lambda: [0, 400, 900])
    assert (grown.schedule, len(grown.windows)) == ("recomputed", 9)
    grown = plan_head(on_host(reach="sequence", num_rows=900, vocab_size=151936), lambda: [0, 400, 800, 900])
    assert grown.windows == [slice(0, 400), slice(400, 800), slice(800, 900)], "grown to hold the longest"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(num_rows=st.integers(0, 10**6), rows=st.integers(200, 10**6), tile=st.sampled_from([1, 64, 128, 200]))
def test_even_windows(num_rows: int, rows: int, tile: int) -> None:
    windows = even_windows(num_rows, rows, tile)
    check_covers(windows, num_rows)
    sizes = [window.stop - window.start for window in windows]
    assert max(sizes) <= rows
    assert len(windows) == max(1, -(-num_rows // rows)), "as few as possible"
    assert max(sizes[:-1], default=0) - min(sizes[:-1], default=0) <= tile
    assert rows % tile or all(window.start % tile == 0 for window in windows)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 50), max_size=40), room=st.integers(0, 100))
def test_sequence_windows(lengths: list[int], room: int) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    rows = max([1, *lengths]) + room
    windows = sequence_windows(bounds, rows)
    if bounds[-1]:
        assert windows[0].start == 0
        assert windows[-1].stop == bounds[-1]
    assert all(a.stop == b.start for a, b in pairwise(windows))
    for window in windows:
        assert {window.start, window.stop} <= set(bounds)
        assert window.stop - window.start <= rows
    for one, other in pairwise(windows):
        first = next(b for b in bounds if b > other.start)
        assert first - one.start > rows, "a window ends only where the next sequence does not fit"


def test_watching_sees_a_plan_per_call_and_nests() -> None:
    hidden, weight = torch.ones(6, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    target, cu = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 4, 6], dtype=torch.int32)

    def loss(**options: object) -> None:
        linear_grpo_loss(hidden, weight, target, torch.ones(2), cu, **options).loss.backward()  # type: ignore[arg-type]

    def logprob() -> None:
        values, entropy = linear_logprob(hidden, weight, target, chunk_size=4)
        (values.sum() + entropy.sum()).backward()

    with watch_plans() as outer:
        loss()
        with watch_plans() as inner:
            loss(chunk_size=2, config=LossConfig(importance_sampling_level="sequence"))
            logprob()
        with torch.no_grad():
            linear_logprob(hidden, weight, target)
        with pytest.raises(RuntimeError), watch_plans():
            raise RuntimeError
        loss(chunk_size=3, schedule="recomputed")
    logprob()
    assert [(plan.schedule, plan.gemms, len(plan.windows)) for plan in inner] == [
        ("recomputed", 4, 3),
        ("recomputed", 4, 2),  # one for forward and backward
    ]
    assert [plan.schedule for plan in outer] == ["fused", "forward", "recomputed"]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab_size"), [(600, 3000), (300, 30000)])
def test_head_bytes_on_the_host(rows: int, vocab_size: int, dtype: torch.dtype, trainable: bool) -> None:
    """Against the allocator, over a forward and backward in one window and in several."""
    hidden = torch.randn(rows, 64).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, 64).to(dtype).requires_grad_(trainable)
    others = torch.randint(vocab_size, (rows,)), torch.randn(3), torch.tensor([0, 100, 200, rows], dtype=torch.int32)

    def step() -> None:
        linear_grpo_loss(hidden, weight, *others).loss.backward()
        hidden.grad = weight.grad = None

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, watch_plans() as plans:
        step()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    made = problem(num_rows=rows, hidden_size=64, vocab_size=vocab_size, dtype=dtype, trainable=trainable)
    made = dataclasses.replace(made, on_device=False, tensor_copies=False)
    assert peak == pytest.approx(head_bytes(made, plans[0]), rel=0.05)


@pytest.mark.parametrize("method", ["epilogue", "single_read", "two_read"])
@pytest.mark.parametrize("trainable", [True, False])
def test_head_bytes_on_a_device(method: str, trainable: bool) -> None:
    """Against the buffers that the code for a GPU allocates, here without one."""
    device = pytest.importorskip("fastgrpo_kernels.head.device")
    N, D, V = 700, 64, 5000
    made = problem(num_rows=N, hidden_size=D, vocab_size=V, trainable=trainable)
    plan = plan_head(made, schedule=method)
    hidden, weight = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(V, D, dtype=torch.bfloat16)
    target = torch.zeros(N, dtype=torch.int64)
    operands = HeadOperands(hidden, weight, None, None, None, target, 1.0, None, 1.0, None, None, "")
    head = device.DeviceHead(operands, plan, [True, trainable, False, False, False], None, (None, None))
    buffers = [head._chunk, head._logits, *head._sums._gradients]
    large = sum(x.untyped_storage().nbytes() for x in buffers)
    assert large + 6 * plan.chunk_rows * D == head_bytes(made, plan)
