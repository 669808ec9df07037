"""The launch code for a GPU, run on fake tensors: every op and schedule, forward and backward; see gpu_dry_run.py."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import fastgrpo_kernels as fk
from fastgrpo_kernels import GroupRewards, LoRADelta, LossConfig
from fastgrpo_kernels.backend import INTERPRETED
from fastgrpo_kernels.grpo_loss.config import LOSS_TYPES, SAMPLING_CORRECTIONS

from .conftest import DRY_RUN
from .gpu_dry_run import DryRun, Reads, dry_run, install

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEQUENCE = LossConfig(importance_sampling_level="sequence")
KERNEL_OF = {"epilogue": "exp_gemm_all", "single_read": "single_read_kernel", "two_read": "token_logprob_backward"}


@pytest.mark.skipif(DRY_RUN or INTERPRETED, reason="needs a process of its own")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_launch_code_passes(tmp_path: Path) -> None:
    """In a process of its own, which is patched for good, and sees no GPU."""
    report, files = tmp_path / "report.xml", sorted(map(str, Path(__file__).parent.glob("test_gpu_dry_run*.py")))
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, f"--junitxml={report}"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"FASTGRPO_DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) - int(suite.attrib["skipped"]) > 100, done.stdout


@pytest.fixture(scope="module")
def fake_gpu() -> None:
    install()


def floats(*shape: int, dtype: torch.dtype = FP32, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda").requires_grad_(grad)


def ints(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cuda")


def run_clean(call: Callable[[], Any], reads: Reads | None = None, capturing: bool = False) -> DryRun:
    made = getattr(getattr(call, "func", call), "__self__", None)
    with dry_run(reads, capturing, made.odd if isinstance(made, Head) else ()) as run:
        call()
    assert run.faults == []
    return run


@contextlib.contextmanager
def autocast_to(dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast("cuda")`, which a torch without CUDA turns off."""
    if dtype is not None:
        torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", dtype is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A call of `linear_grpo_loss`, or of `linear_logprob`. needs: of hidden and weight. lora: its rank."""

    N: int = 512
    D: int = 256
    V: int = 1024
    S: int = 4
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype | None = None
    needs: tuple[bool, bool] = (True, True)
    bias: torch.dtype | None = None
    lora: int | None = None
    autocast: torch.dtype | None = None
    view: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    main_grad: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def odd(self) -> set[str]:
        """The kernels' arguments that the shapes keep from dividing by 16."""
        names = {"V"} if self.V % 16 else set()
        if self.D % 16:
            names |= {"D", "hidden_stride", "weight_stride", "stride_h", "stride_w", "x_stride", "out_stride"}
        if self.lora is not None and self.lora % 16:
            names |= {"R", "rank", "low_hidden_stride", "low_weight_stride", "D", "x_stride", "out_stride"}
        return names

    def _shared(self) -> tuple[list[Tensor], dict[str, Any]]:
        weight_dtype = self.weight_dtype or self.dtype
        hidden = self.view(floats(self.N, self.D, dtype=self.dtype)).requires_grad_(self.needs[0])
        D = hidden.shape[1]
        weight = floats(self.V, D, dtype=weight_dtype, grad=self.needs[1])
        arguments: dict[str, Any] = {"into_main_grad": self.main_grad, **self.options}
        if self.main_grad:
            weight.main_grad = floats(self.V, D)  # type: ignore[attr-defined]
        if self.bias is not None:
            arguments["bias"] = floats(self.V, dtype=self.bias, grad=self.needs[1])
        if self.lora is not None:
            a, b = floats(self.lora, D, dtype=self.dtype, grad=True), floats(self.V, self.lora, grad=True)
            arguments["lora"] = LoRADelta(a, b.to(weight_dtype), 0.5)
        return [hidden, weight, ints(hidden.shape[0])], arguments

    def logprob(self) -> None:
        with autocast_to(self.autocast):
            operands, arguments = self._shared()
            fk.linear_logprob(*operands, **arguments)

    def loss(self, *, old: bool = True, mask: bool = False, rewards: bool = False, per_token: bool = False) -> None:
        with autocast_to(self.autocast):
            operands, arguments = self._shared()
            N = operands[0].shape[0]
            advantage: Any = floats(N if per_token else self.S)
            if rewards:
                advantage = GroupRewards(floats(self.S), ints(self.S))
            if old:
                arguments["old_logprob"] = floats(N)
            if mask:
                arguments["mask"] = torch.empty(N, dtype=torch.bool, device="cuda")
            hidden, weight, target = operands
            fk.linear_grpo_loss(hidden, weight, target, advantage, ints(self.S + 1, torch.int32), **arguments)


def options(**values: Any) -> dict[str, Any]:
    return {"options": values}


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one row": {"N": 1, "S": 1},
    "no rows": {"N": 0},
    "nothing": {"N": 0, "S": 0},
    "D 4096": {"N": 8192, "D": 4096, "V": 128_256, "S": 16},
    "D 896": {"N": 8192, "D": 896, "V": 151_936, "S": 16},
    "D 4096, frozen": {"N": 8192, "D": 4096, "V": 128_256, "S": 16, "needs": (True, False)},
    "D 4096, forward": {"N": 70_000, "D": 4096, "V": 128_256, "S": 16, "needs": (False, False)},
    "past 2^31 logits": {"N": 17_000, "D": 4096, "V": 128_256, **options(chunk_size=17_000)},
    "odd D": {"D": 251},
    "tiny": {"D": 8, "V": 7},
    "frozen": {"needs": (True, False)},
    "weight only": {"needs": (False, True)},
    "forward": {"needs": (False, False)},
    "fp16": {"dtype": FP16},
    "fp16, frozen": {"dtype": FP16, "needs": (True, False)},
    "fp16, forward": {"dtype": FP16, "needs": (False, False)},
    "fp32": {"dtype": FP32},
    "fp32, odd V": {"dtype": FP32, "V": 1003},
    "fp32 weight": {"weight_dtype": FP32},
    "autocast": {"dtype": FP32, "autocast": BF16},
    "autocast to fp16": {"dtype": FP32, "autocast": FP16},
    "autocast of the weight, LoRA": {"weight_dtype": FP32, "autocast": BF16, "lora": 8},
    "softcap": options(softcap=30.0),
    "softcap, fp16": {"dtype": FP16, **options(softcap=30.0)},
    "softcap, fp32": {"dtype": FP32, **options(softcap=30.0, temperature=0.7)},
    "softcap, odd V": {"V": 32_001, **options(softcap=30.0)},
    "bias": {"bias": BF16},
    "fp32 bias, softcap": {"bias": FP32, **options(softcap=30.0)},
    "bias, frozen": {"bias": BF16, "needs": (True, False)},
    "bias, LoRA, softcap, odd V": {"bias": BF16, "lora": 8, "V": 32_001, **options(softcap=30.0)},
    "LoRA 8, frozen": {"lora": 8, "needs": (True, False)},
    "LoRA 5": {"lora": 5},
    "LoRA only": {"lora": 16, "needs": (False, False)},
    "LoRA, fp16": {"lora": 16, "dtype": FP16},
    "rows from an odd one on": {"N": 513, "view": lambda x: x[1:]},
    "columns from an odd one on": {"D": 264, "view": lambda x: x[:, 1:257]},
    "rows 8 bytes off": {"D": 260, "view": lambda x: x[:, :256]},
    "transposed": {"N": 256, "D": 512, "view": lambda x: x.t()},
    "main_grad": {"main_grad": True},
    "main_grad, chunks": {"N": 4096, "V": 4099, "main_grad": True, **options(chunk_size=512)},
}


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("op", ["loss", "logprob"])
def test_head(op: str, name: str) -> None:
    head = Head(**HEADS[name])
    run = run_clean(head.loss if op == "loss" else head.logprob)
    assert bool(run.launches) == bool(head.N)
    wanted = sum(head.needs) + (2 if head.lora else 0) + (head.bias is not None and head.needs[1])
    if head.N and torch.float32 not in (head.dtype, head.weight_dtype):
        assert len(run.gemms) >= wanted


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("V", [1, 1024, 32_001])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("schedule", ["epilogue", "single_read", "two_read", "recomputed"])
def test_schedule(schedule: str, frozen: bool, V: int) -> None:
    """One window, windows of tokens, and windows of sequences whose bounds the host cannot know."""
    made: dict[str, Any] = {"V": V, "needs": (True, not frozen)}
    for chunk, config in product((None, 128), (LossConfig(), SEQUENCE)):
        head = Head(**made, **options(schedule=schedule, chunk_size=chunk, config=config))
        run = run_clean(head.loss, capturing=True)
        assert KERNEL_OF.get(schedule, "exp_gemm_all") in run.names
    for entropy in (False, True):
        if entropy and schedule in ("epilogue", "single_read"):
            continue
        run_clean(Head(**made, **options(schedule=schedule, entropy_gradient=entropy)).logprob)


LOSSES: dict[str, dict[str, Any]] = {
    "on-policy": {"old": False},
    "rewards": {"rewards": True},
    "rewards, whole sequences": {"rewards": True, "config": SEQUENCE},
    "per token": {"per_token": True},
    "entropy bonus": {"config": LossConfig(entropy_coef=0.1)},
    "entropy bonus, frozen": {"config": LossConfig(entropy_coef=0.1), "needs": (True, False)},
    "quantile": {"config": LossConfig(top_entropy_quantile=0.2)},
    "quantile, chunks": {"config": LossConfig(top_entropy_quantile=0.2), "chunk_size": 128},
    "threshold": {"entropy_threshold": 0.5},
}


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", LOSSES)
def test_head_of_loss(name: str, capturing: bool) -> None:
    case = dict(LOSSES[name])
    made = {key: case.pop(key) for key in ("needs",) if key in case}
    how = {key: case.pop(key) for key in ("old", "rewards", "per_token") if key in case}
    run_clean(partial(Head(**made, **options(**case)).loss, **how), capturing=capturing)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("lora", [None, 8])
def test_mask_is_counted_unless_captured(rows: int, lora: int | None) -> None:
    head = Head(lora=lora)
    for rewards in (False, True):
        waiting = run_clean(partial(head.loss, mask=True, rewards=rewards), Reads(("nonzero",), rows=rows))
        captured = run_clean(partial(head.loss, mask=True, rewards=rewards), capturing=True)
        assert captured.reads == []
        assert len(waiting.gemms) == (len(captured.gemms) if rows else 0)


@pytest.mark.usefixtures("fake_gpu")
def test_bounds_are_read_where_sequences_must_fit_chunks() -> None:
    head = Head(**options(chunk_size=256, config=SEQUENCE))
    fused = run_clean(head.loss, Reads(("tolist",), bounds=[0, 200, 250, 400, 512]))
    assert [rows for rows, _, _ in fused.gemms[::2]] == [250, 150, 112]  # dH of each window, dW after it
    recomputed = run_clean(head.loss, Reads(("tolist",), bounds=[0, 300, 350, 400, 512]))
    assert [rows for rows, _, _ in recomputed.gemms[::2]] == [256, 256]
    assert recomputed.names.count("exp_gemm_all") == 2 * len([256, 256])


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("schedule", ["epilogue", "single_read", "two_read", "recomputed"])
def test_lengths_compile_nothing_anew(schedule: str) -> None:
    def seen(N: int, S: int) -> set[Any]:
        head = Head(N=N, S=S, D=64, V=1003, **options(schedule=schedule, chunk_size=128))
        return set(run_clean(head.loss, capturing=True).launches)

    first = seen(256, 3)
    assert first
    for N, S in ((17, 1), (190, 20), (501, 2), (1, 1)):
        assert seen(N, S) <= first, (N, S)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("V", [1, 7, 1000, 32_001, 151_936])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_token_logprob(V: int, dtype: torch.dtype, softcap: float | None) -> None:
    run = run_clean(lambda: fk.token_logprob(floats(48, V, dtype=dtype, grad=True), ints(48), softcap=softcap))
    assert run.names == ["token_logprob_forward", *["token_logprob_backward"] * 3]


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, 8:], lambda x: x[:1].expand(4, 1024), lambda x: x.t()])
def test_token_logprob_of_views(view: Callable[[Tensor], Tensor]) -> None:
    def call() -> None:
        x = view(floats(48, 1024, dtype=BF16)).requires_grad_()
        fk.token_logprob(x, ints(x.shape[0] * 2)[::2])

    run_clean(call)
    assert run_clean(lambda: fk.token_logprob(floats(0, 5, grad=True), ints(0))).launches == []


def loss_of(
    config: LossConfig, N: int = 512, S: int = 5, dtype: torch.dtype = FP32, offset: int = 0, **how: Any
) -> None:
    """`grpo_loss` with everything that it can be given, its vectors from the offset's element on."""

    def vector(grad: bool = False) -> Tensor:
        return floats(N + offset, dtype=dtype)[offset:].requires_grad_(grad)

    advantage: Any = floats(N if how.pop("per_token", False) else S, dtype=dtype)
    if how.pop("rewards", False):
        advantage = GroupRewards(floats(S, dtype=dtype), ints(S))
    mask = torch.empty(N + offset, dtype=torch.bool, device="cuda")[offset:]
    fk.grpo_loss(
        vector(True), advantage, ints(S + 1, torch.int32), entropy=vector(True), old_logprob=vector(),
        ref_logprob=vector(), sampling_logprob=vector(), mask=mask, config=config, **how,
    )  # fmt: skip


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_loss_types(name: Any, level: Any) -> None:
    config = LossConfig(
        loss_type=name, importance_sampling_level=level, beta=0.1, epsilon_high=5.0, max_completion_length=9,
        entropy_coef=0.01,
    )  # fmt: skip
    assert run_clean(lambda: loss_of(config)).names == ["coefficients_kernel", "finish_kernel"]


GRPO_LOSSES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": FP16},
    "rewards": {"rewards": True},
    "bf16 rewards": {"rewards": True, "dtype": BF16},
    "thousands of rewards": {"rewards": True, "S": 5000, "N": 10_000},
    "per token": {"per_token": True},
    "from an odd element on": {"offset": 1},
    "threshold": {"entropy_threshold": 0.5},
    "numbers on the device": {"num_sequences": "int64", "num_tokens": "int32"},
    "one": {"N": 1, "S": 1},
    "no rows": {"N": 0},
    "no sequences": {"N": 0, "S": 0},
}


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("name", GRPO_LOSSES)
def test_grpo_loss(name: str) -> None:
    def call() -> None:
        case: dict[str, Any] = {
            key: torch.empty((), dtype=getattr(torch, value), device="cuda") if isinstance(value, str) else value
            for key, value in GRPO_LOSSES[name].items()
        }
        loss_of(LossConfig(off_policy_mask_threshold=0.1, top_entropy_quantile=0.5), **case)

    run_clean(call)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("correction", SAMPLING_CORRECTIONS)
def test_corrections(correction: Any) -> None:
    run_clean(lambda: loss_of(LossConfig(sampling_correction=correction, beta=0.1, kl_bias_correction=True)))


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_advantages(dtype: torch.dtype) -> None:
    run = run_clean(lambda: fk.gae(floats(9, dtype=dtype)[1:], floats(8, dtype=dtype), ints(3, torch.int32)))
    assert run.names == ["gae_kernel"]
    for baseline, scale in product(("mean", "leave_one_out", "none"), ("group", "batch", "none")):
        if (baseline, scale) != ("none", "group"):
            rule: dict[str, Any] = {"baseline": baseline, "scale": scale}
            run = run_clean(lambda: fk.group_advantages(floats(9, dtype=dtype), ints(9), **rule))  # noqa: B023
            assert run.names == ["batch_std_kernel"] * (scale == "batch") + ["group_advantages_kernel"]
