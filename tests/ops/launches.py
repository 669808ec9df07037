"""Launches of Triton kernels, and whether their modules' `KERNELS` list them, so that `make kernels` compiles them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernel_table import kernel_modules
from fastgrpo_kernels.specs import KernelSpec

ARCH = "sm_90"

ANY_FLOAT = frozenset({"p_old", "p_ref", "p_sampling", "p_advantage", "p_bias", "p_rewards"})
"""Vectors in the caller's dtype, listed in one."""

COVERED = frozenset(
    {"exp_gemm_all", "exp_gemm_flagged", "target_logit_kernel", "single_read_kernel", "coefficients_kernel"}
    | {"rms_norm_backward_kernel", "rotate_heads_backward_kernel"}
)
"""Kernels listed with their optional arguments: a launch may leave out tensors and options of one that is listed."""

UNSAID_STAGES = 3
"""Stages where a launch names none: Triton's default for CUDA."""


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel as Triton specialized it. types: of arguments that are left at run time; promises: those that divide
    by 16; constants: the others.
    """

    kernel: Any
    types: Mapping[str, str]
    promises: frozenset[str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def unlisted(self, specs: Sequence[KernelSpec], odd: frozenset[str]) -> str:
        """What keeps the launch from being any of the specs, "" if it is one.

        A dataclass that selects code has more values than a list: each of its fields must be listed in some of them.
        """
        for name, value in self.constants.items():
            for part in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
                chosen = getattr(value, part.name)
                if all(getattr(spec.constexprs[name], part.name) != chosen for spec in specs):
                    return f"{name}.{part.name}: {chosen!r}"
        reasons = [self._unlike(spec, odd) for spec in specs]
        return "; ".join(sorted(set(reasons))) or "its kernel" if all(reasons) else ""

    def _unlike(self, spec: KernelSpec, odd: frozenset[str]) -> str:
        if (self.num_warps, self.num_stages) != (spec.num_warps, spec.num_stages or UNSAID_STAGES):
            return f"{self.num_warps} warps, {self.num_stages} stages"
        covered = self.name in COVERED
        for name in self.kernel.arg_names:
            listed, _, promise = spec.signature.get(name, "").partition(":")
            if name in self.types:
                if not _same_type(name, self.types[name], listed):
                    return f"{name}: {self.types[name]}"
                if promise and name not in self.promises | odd:
                    return f"{name}: does not divide by {promise}"
            elif listed:
                value = self.constants[name]
                if not ((value == 1 and listed == "i32") or (value is None and covered)):
                    return f"{name}: {value}"
            elif not _same_constant(self.constants[name], spec.constexprs[name], covered):
                return f"{name}: {self.constants[name]}"
        return ""


def _same_type(name: str, launched: str, listed: str) -> bool:
    if name in ANY_FLOAT and launched in ("*bf16", "*fp16", "*fp32"):
        return listed in ("*bf16", "*fp32")
    return launched.replace("fp16", "bf16").replace("u1", "i1").replace(" ", "") == listed


def _same_constant(launched: Any, listed: Any, covered: bool) -> bool:
    if covered and isinstance(launched, bool):
        return launched <= listed
    if dataclasses.is_dataclass(launched):
        return True  # `unlisted` looks at its fields
    return type(launched) is type(listed) and launched == listed


@functools.cache
def listed() -> dict[Any, list[KernelSpec]]:
    specs: dict[Any, list[KernelSpec]] = {}
    for module in kernel_modules():
        for spec in importlib.import_module(module).KERNELS:
            if spec.archs is None or ARCH in spec.archs:
                specs.setdefault(spec.kernel, []).append(spec)
    return specs
