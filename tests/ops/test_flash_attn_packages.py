"""Which flash attention runs: what is installed, what it can do, and what is done about versions that nobody knows."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import PackedLayout, shared_prefix_attention, why_not_flash
from fastgrpo_kernels.shared_prefix_attention import backends
from fastgrpo_kernels.shared_prefix_attention.flash_attn_2 import FlashAttn2
from fastgrpo_kernels.shared_prefix_attention.flash_attn_3 import FlashAttn3
from fastgrpo_kernels.shared_prefix_attention.flash_attn_4 import FlashAttn4
from fastgrpo_kernels.shared_prefix_attention.options import Options
from fastgrpo_kernels.shared_prefix_attention.packages import PackageKernels

from .attention_cases import DenseVarlen, inputs, run
from .flash_stand_ins import STAND_INS, clear, install

Machine = Callable[..., None]

SHARED = PackedLayout([3, 5], [[2, 4, 4], [1]])
PLAIN = PackedLayout([3, 5], [[], []])
VERSIONS: dict[str, PackageKernels] = {
    "flash_attn_2": FlashAttn2(),
    "flash_attn_3": FlashAttn3(),
    "flash_attn_4": FlashAttn4(),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """`machine((9, 0), "flash_attn_3")`: a GPU of that compute capability, the packages that are installed."""

    def set_up(capability: tuple[int, int], *packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        for name in packages:
            install(monkeypatch, name, DenseVarlen())
        clear()

    yield set_up
    clear()


class Somewhere:
    """As much of a tensor as a choice looks at."""

    def __init__(self, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, d: int = 64) -> None:
        self.device, self.dtype, self.shape = torch.device(device), dtype, (1, 1, d)

    def __getitem__(self, _: slice) -> Somewhere:
        return self


def choose(layout: PackedLayout = SHARED, window: int | None = None, softcap: float | None = None, **q: Any) -> str:
    """What runs; and `why_not_flash` agrees, before the call and without raising."""
    where: Any = Somewhere(**q)
    why = why_not_flash(where, layout, window=window, softcap=softcap)
    try:
        name = backends.choose(where, layout.attention, Options(1.0, window, softcap))
    except ValueError as error:
        said = str(error)
    else:
        assert (why is None) == (name != "dense")
        return name
    assert said == why
    raise ValueError(said)


ALL = tuple(STAND_INS)


@pytest.mark.parametrize(
    ("capability", "installed", "used"),
    [
        ((8, 0), (), "torch"),
        ((8, 6), ALL, "flash_attn_2"),
        ((9, 0), (), "torch"),
        ((9, 0), ("flash_attn_2",), "flash_attn_2"),
        ((9, 0), ("flash_attn_2", "flash_attn_3"), "flash_attn_3"),
        ((9, 0), ALL, "flash_attn_4"),
        ((10, 0), ALL, "flash_attn_4"),
        ((10, 3), ("flash_attn_2", "flash_attn_3"), "flash_attn_2"),
        ((12, 0), ALL, "flash_attn_2"),
        ((12, 0), ("flash_attn_3", "flash_attn_4"), "torch"),
        ((7, 5), ALL, "dense"),
    ],
)
def test_the_newest_that_the_gpu_can_run(
    machine: Machine, capability: tuple[int, int], installed: tuple[str, ...], used: str
) -> None:
    machine(capability, *installed)
    assert choose() == choose(PLAIN) == choose(PLAIN, window=2) == used


def test_head_sizes(machine: Machine) -> None:
    machine((9, 0), *ALL)
    assert [choose(d=d) for d in (8, 128, 192, 256)] == ["flash_attn_4"] * 4
    machine((9, 0), "flash_attn_2", "flash_attn_3")
    sys.modules.pop(VERSIONS["flash_attn_4"].module)
    clear()
    assert [choose(d=d) for d in (8, 128, 192, 200, 256)] == ["flash_attn_3"] * 3 + ["flash_attn_2"] * 2
    machine((10, 0), *ALL)
    assert [choose(d=d) for d in (8, 128, 136, 256)] == ["flash_attn_4"] * 2 + ["flash_attn_2"] * 2
    for d in (20, 264):
        assert choose(d=d) == "dense"


def test_softcaps(machine: Machine) -> None:
    machine((9, 0), *ALL)
    assert choose(softcap=2.0) == "flash_attn_3"
    machine((10, 0), *ALL)
    assert choose(softcap=2.0) == "flash_attn_2"
    for kernels in VERSIONS.values():
        sys.modules.pop(kernels.module)
    clear()
    with pytest.raises(ValueError, match=r"softcap: no flash attention here takes 2.0; .*flash_attn_2: not installed"):
        choose(softcap=2.0)


def test_what_no_flash_attention_takes(machine: Machine) -> None:
    machine((9, 0), *ALL)
    assert choose(dtype=torch.float32) == choose(dtype=torch.float64, softcap=1.0) == choose(device="mps") == "dense"
    assert choose(device="cpu", window=3) == choose(device="cpu", dtype=torch.float64) == "cpu"
    assert choose(device="cpu", softcap=3.0) == "dense"
    with pytest.raises(ValueError, match=r"window: .* window of 3 .*PackedLayout with the lengths"):
        choose(window=3)


def test_why_not_flash_of_real_calls() -> None:
    """A window as long as every path is none."""
    q = torch.randn(SHARED.num_tokens, 2, 8)
    assert why_not_flash(q, SHARED) is None
    assert why_not_flash(q, SHARED, window=9) is None
    assert why_not_flash(q, SHARED, softcap=1.0) == "softcap: the CPU's flash attention has none"
    somewhere: Any = Somewhere(dtype=torch.float32)
    assert why_not_flash(somewhere, SHARED) == "dtype: flash attention takes float16 and bfloat16, got float32"


def test_why_not_flash_knows_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cast before the call counts as cast."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(backends, "why_not_flash", lambda q, *_: seen.append(q.dtype))
    q = torch.randn(SHARED.num_tokens, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        why_not_flash(q, SHARED)
    why_not_flash(q, SHARED)
    assert seen == [torch.bfloat16, torch.float32]


def test_a_description_of_a_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.describe("cpu") == [("cpu", "used")]
    machine((9, 0), "flash_attn_2")
    assert backends.describe("cuda") == [
        ("flash_attn_4", "not installed (pip install --pre -U flash-attn-4)"),
        ("flash_attn_3", "not installed (build hopper/ of github.com/Dao-AILab/flash-attention)"),
        ("flash_attn_2", "used"),
        ("torch", "for what flash_attn_2 does not take"),
        ("dense", "for dtypes and head sizes that no flash attention takes"),
    ]
    machine((7, 0), *ALL)
    rows = dict(backends.describe(torch.device("cuda")))
    assert rows["dense"] == "used"
    assert rows["flash_attn_3"] == "needs compute capability 9.x, this is compute capability 7.0"
    assert rows["torch"] == "needs compute capability 8.0 or later, this is compute capability 7.0"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    clear()
    rows = dict(backends.describe("cuda"))
    assert rows["flash_attn_4"] == "needs compute capability 9.x, 10.x or 11.x, this is cuda"
    assert rows["flash_attn_2"] == "used"


@pytest.mark.parametrize("name", VERSIONS)
def test_what_is_checked_is_what_is_passed(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a signature could pass the check and fail the call."""
    machine((9, 0), name)
    kernels = VERSIONS[name]
    assert kernels.problem() is None
    passed: list[set[str]] = []
    module = sys.modules[kernels.module]
    for function in kernels.functions:
        real = getattr(module, function)

        def spy(real: Any = real, **arguments: Any) -> Any:
            passed.append(set(arguments))
            return real(**arguments)

        monkeypatch.setattr(module, function, spy)
    monkeypatch.setattr(backends, "choose", lambda *_: name)
    run(shared_prefix_attention, inputs(PLAIN), PLAIN)
    assert passed == list(kernels.keywords())


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("which", [0, 1])
def test_another_signature_is_not_called(
    machine: Machine, name: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that is gone, one that has come and wants a value, everything, nothing: none is guessed at."""
    machine((9, 0), name)
    kernels = VERSIONS[name]
    module, function = sys.modules[kernels.module], kernels.functions[which]
    names = sorted(kernels.keywords()[which])

    def with_parameters(text: str) -> Any:
        scope: dict[str, Any] = {}
        exec(f"def f({text}): raise AssertionError", scope)
        return scope["f"]

    cases = {
        ", ".join(names): None,
        ", ".join([*names, "more=1"]): None,
        ", ".join(n for n in names if n != "window_size_left"): "unexpected keyword argument 'window_size_left'",
        ", ".join([*names, "sinks"]): "missing a required argument: 'sinks'",
        "*args, **kwargs": "its parameters cannot be seen",
    }
    for text, problem in cases.items():
        monkeypatch.setattr(module, function, with_parameters(text))
        clear()
        got = kernels.problem()
        assert got is None if problem is None else problem in str(got) and function in str(got), text
        assert choose() == (name if problem is None else "torch")
    monkeypatch.delattr(module, function)
    clear()
    assert f"{function}: not there" in str(kernels.problem())


def test_the_earlier_flash_attention_3_is_told_by_its_signature(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `deterministic` does nothing; and it has one `window_size`, and `causal` in the backward, too."""
    machine((9, 0), "flash_attn_3")

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        raise AssertionError

    monkeypatch.setattr(sys.modules["flash_attn_interface"], "_flash_attn_backward", _flash_attn_backward)
    clear()
    assert choose() == "torch"
    assert "this version is not known" in dict(backends.describe("cuda"))["flash_attn_3"]


def test_functions_that_are_operators_of_pytorch(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in versions 2 and 3: what an operator takes is what the function it was made of takes."""
    machine((9, 0), "flash_attn_2")
    kernels = VERSIONS["flash_attn_2"]

    def made(missing: str = "") -> Any:
        parts = [n for n in sorted(kernels.keywords()[0]) if n != missing]
        scope = {"Tensor": Tensor}
        exec(f"def f({', '.join(f'{n}: Tensor' for n in parts)}) -> Tensor: return {parts[0]}", scope)
        return torch.library.custom_op(f"fastgrpo_test::op{len(parts)}", scope["f"], mutates_args=())

    module = sys.modules[kernels.module]
    monkeypatch.setattr(module, kernels.functions[0], made())
    clear()
    assert kernels.problem() is None
    monkeypatch.setattr(module, kernels.functions[0], made(missing="softcap"))
    clear()
    assert "unexpected keyword argument 'softcap'" in str(kernels.problem())


@pytest.mark.parametrize(
    ("version", "usable"),
    [
        ("4.0.0b32", True),
        ("4.0.0b36", True),
        ("4.0.0b40.dev3", True),
        ("4.0.0", True),
        ("4.1.2", True),
        ("4.0.0b31", False),
        ("4.0.0b3", False),
        ("4.0.0a1", False),
        ("0.0.0", False),
        (None, False),
    ],
)
def test_versions_of_flash_attention_4(
    machine: Machine, version: str | None, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0), "flash_attn_4")

    def read(_: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", read)
    clear()
    assert choose() == ("flash_attn_4" if usable else "torch")
    if not usable:
        said = dict(backends.describe("cuda"))["flash_attn_4"]
        assert said == f"version {version or 'unknown'}; known from 4.0.0b32 on (pip install --pre -U flash-attn-4)"


@pytest.mark.parametrize(
    ("disabled", "call", "used"),
    [
        ((), {"d": 192}, "flash_attn_3"),
        (("BACKWARD",), {}, "torch"),
        (("VARLEN",), {}, "torch"),
        (("HDIM192",), {"d": 192}, "torch"),
        (("HDIM192",), {"d": 128}, "flash_attn_3"),
        (("HDIM64", "HDIM96"), {"d": 64}, "flash_attn_3"),  # padded to 128
        (("HDIM64", "HDIM96", "HDIM128", "HDIM192"), {"d": 64}, "torch"),
        (("LOCAL",), {"layout": PLAIN, "window": 2}, "torch"),
        (("LOCAL",), {"layout": PLAIN}, "flash_attn_3"),
        (("FP16",), {"dtype": torch.float16}, "torch"),
        (("FP16", "SOFTCAP", "PAGEDKV"), {}, "flash_attn_3"),
    ],
)
def test_builds_of_flash_attention_3(
    machine: Machine, disabled: tuple[str, ...], call: dict[str, Any], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0), "flash_attn_3")
    config = types.ModuleType("flash_attn_config")
    flags = ("BACKWARD", "VARLEN", "LOCAL", "SOFTCAP", "FP16", "PAGEDKV", "HDIM64", "HDIM96", "HDIM128", "HDIM192")
    config.__dict__["CONFIG"] = {"build_flags": {f"FLASHATTENTION_DISABLE_{f}": f in disabled for f in flags}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    clear()
    assert choose(**call) == used


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ImportError("undefined symbol: _ZN3c10"), "cannot be imported: ImportError: undefined symbol: _ZN3c10"),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), "cannot be imported: ModuleNotFoundError"),
        (RuntimeError("no driver"), "cannot be imported: RuntimeError: no driver"),
        (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn"), "not installed (pip install"),
        (ModuleNotFoundError("...", name="flash_attn.cute"), "not installed (pip install"),
    ],
)
def test_packages_that_break_at_their_import(
    machine: Machine, error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0), "flash_attn_4")

    class Broken:
        """Finds the module, and fails as it would."""

        def find_spec(self, name: str, *_: Any) -> None:
            if name.startswith("flash_attn"):
                raise error

    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    clear()
    assert choose() == "torch"
    assert says in dict(backends.describe("cuda"))["flash_attn_4"]
