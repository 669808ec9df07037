"""Flash attention of other packages: is it here, and do its functions take what we pass? Asked before any launch.

A package whose functions have other parameters than we know is left alone, with the reason; it is never called on the
chance that it means the same.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .options import Options, Part

Arguments = dict[str, Any]


class PackageKernels(ABC):
    """`VarlenKernels` made of two functions of a package, called by keyword: the versions order them differently.

    module: what is imported. install: what a person does to get it. functions: the names of forward and backward.
    everything: what they call a window without an end.
    """

    module: ClassVar[str]
    install: ClassVar[str]
    functions: ClassVar[tuple[str, str]]
    everything: ClassVar[int | None] = -1

    def common(self, q: Tensor, k: Tensor, v: Tensor, part: Part, options: Options) -> Arguments:
        """What all versions call the same. A window counts the rows to the left and right, itself not among them."""
        left, right = (self.everything,) * 2 if options.window is None else (options.window - 1, 0)
        return {
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": part.cu_q,
            "cu_seqlens_k": part.cu_k,
            "max_seqlen_q": part.max_q,
            "max_seqlen_k": part.max_k,
            "softmax_scale": options.scale,
            "window_size_left": left,
            "window_size_right": right,
        }

    @abstractmethod
    def forward_only(self, part: Part, options: Options) -> Arguments:
        """What else this version's forward is told."""

    @abstractmethod
    def backward_only(self, lse: Tensor, part: Part, options: Options) -> Arguments:
        """What else this version's backward is told."""

    def problem(self) -> str | None:
        """Why the package cannot be used, None when it can."""
        return _problem(self)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, options: Options) -> tuple[Tensor, Tensor]:
        function = getattr(importlib.import_module(self.module), self.functions[0])
        out, lse, *_ = function(**self.common(q, k, v, part, options), **self.forward_only(part, options))
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        function = getattr(importlib.import_module(self.module), self.functions[1])
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        function(
            **self.common(q, k, v, part, options), **self.backward_only(lse, part, options),
            dout=dout, out=out, dq=dq, dk=dk, dv=dv, deterministic=True,
        )  # fmt: skip
        return dq, dk, dv

    def keywords(self) -> tuple[set[str], set[str]]:
        """Of the two functions: what the calls above pass."""
        x = torch.empty(0)
        part, options = Part(x, x, 0, 0, True), Options(1.0, None, None)
        common = self.common(x, x, x, part, options).keys()
        backward = {"dout", "out", "dq", "dk", "dv", "deterministic"}
        return (
            common | self.forward_only(part, options).keys(),
            common | self.backward_only(x, part, options).keys() | backward,
        )


@functools.cache
def _problem(kernels: PackageKernels) -> str | None:
    try:
        module = importlib.import_module(kernels.module)
    except Exception as error:  # built for another torch, say: a package that nobody asked for must stop nobody
        absent = isinstance(error, ModuleNotFoundError) and f"{kernels.module}.".startswith(f"{error.name}.")
        if absent:  # itself, not something that it needs
            return f"not installed ({kernels.install})"
        return f"{kernels.module} cannot be imported: {type(error).__name__}: {error}"
    for function, keywords in zip(kernels.functions, kernels.keywords(), strict=True):
        mismatch = _mismatch(module, function, keywords)
        if mismatch:
            return f"{kernels.module}.{function}: {mismatch}; this version is not known here ({kernels.install})"
    return None


def _mismatch(module: ModuleType, function: str, keywords: set[str]) -> str | None:
    found: Any = getattr(module, function, None)
    if found is None:
        return "not there"
    # The packages make them operators of PyTorch, whose own signature is `(*args, **kwargs)`.
    signature = inspect.signature(getattr(found, "_init_fn", found))
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return "its parameters cannot be seen"
    try:
        signature.bind(**dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU, such as (9, 0); (0, 0) for everything else: what AMD reports is another count."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def gpu(device: torch.device) -> str:
    major, minor = capability(device)
    return f"this is compute capability {major}.{minor}" if major else f"this is {device.type}"
