"""Runs the launch code for a GPU (sm_90) where there is none: fake tensors on "cuda", Triton up to its compiler.

Host code runs as it is: the ops' implementations, their fake ones, what they save and their backwards, Triton's
specialization of every argument, its options and caches. Not run are the compiler (`make kernels` compiles what is
listed), the kernels (the interpreter's tests do) and cuBLAS. `DryRun.faults` says what a GPU would refuse or slow down:

- grids out of range; operands not on the GPU; vectors whose elements are apart; descriptors that TMA does not take;
- a kernel that is launched in a form that its module's `KERNELS` does not list, so that nothing compiled it before:
  types, compile-time arguments, warps, stages, and promises of alignment that the launch does not keep;
- GEMMs with operands that cuBLAS would not take as they lie, or other types than it is meant for;
- waits for the device, but those that `Reads` announces;
- implementations whose results are not their fake implementations', gradients that are not like their inputs.

`install` patches torch and triton for good: for a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from .launches import Launch, listed

BASE = 1 << 40  # the address of every storage
HALF = (torch.bfloat16, torch.float16)

_HOST_READS = (torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__)
_NAMES = {"__invert__": "bitwise_not", "__and__": "bitwise_and", "__or__": "bitwise_or"}


@dataclass(frozen=True)
class Reads:
    """What the host may wait for, in this order: "nonzero" finds `rows` rows, "tolist" reads `bounds`."""

    expected: tuple[str, ...] = ()
    rows: int = 0
    bounds: Sequence[int] = ()


@dataclass
class DryRun:
    """What was seen. odd: integer arguments of kernels that need not divide by 16 here, whatever is listed.

    reads: what the host waited for. gemms: of cuBLAS, the shapes (m, k, n).
    """

    allowed: Reads
    capturing: bool
    odd: frozenset[str]
    faults: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    gemms: list[tuple[int, int, int]] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    backwards: list[tuple[CustomOpDef, tuple[Any, ...], _Context, tuple[Tensor, ...]]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the kernels, in order."""
        return [launch.name for launch in self.launches]

    def read(self, what: str) -> None:
        if self.capturing or len(self.reads) >= len(self.allowed.expected):
            self.faults.append(f"host sync: {what}")
        self.reads.append(what)

    def launch(self, launch: Launch, grid: tuple[int, int, int], arguments: Mapping[str, Any]) -> None:
        self.launches.append(launch)
        if not 0 < grid[0] < 1 << 31 or grid[1:] != (1, 1):
            self.faults.append(f"{launch.name}: grid {grid}")
        for name in launch.types:
            self._check_argument(f"{launch.name}: {name}", arguments[name])
        if why := launch.unlisted(listed().get(launch.kernel, []), self.odd):
            self.faults.append(f"{launch.name}: not listed: {why}")

    def _check_argument(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if not value.is_cuda:
                self.faults.append(f"{name}: on {value.device}")
            if value.ndim == 1 and value.numel() > 1 and value.stride(0) != 1:
                self.faults.append(f"{name}: a vector with stride {value.stride(0)}")
        elif hasattr(value, "block_shape"):
            size = value.base.element_size()
            box = value.block_shape
            if value.base.data_ptr() % 16 or value.base.data_ptr() < BASE:
                self.faults.append(f"{name}: descriptor of a base at {value.base.data_ptr():#x}")
            if value.strides[-1] != 1 or any(s * size % 16 or s * size >= 1 << 40 for s in value.strides[:-1]):
                self.faults.append(f"{name}: descriptor with strides {list(value.strides)}")
            if any(not 0 < rows <= 256 for rows in box) or box[-1] * size % 16:
                self.faults.append(f"{name}: descriptor with boxes {list(box)}")
            if list(value.shape) != list(value.base.shape) or any(not 0 < n < 1 << 32 for n in value.shape):
                self.faults.append(f"{name}: descriptor of shape {list(value.shape)}")

    def gemm(self, a: Tensor, b: Tensor, out: Tensor, into: Tensor | None) -> Tensor:
        self.gemms.append((a.shape[0], a.shape[1], b.shape[1]))
        if a.dtype != b.dtype or a.dtype not in HALF or out.dtype != torch.float32:
            self.faults.append(f"gemm: {a.dtype} x {b.dtype} -> {out.dtype}")
        if into is not None and into is not out:
            self.faults.append("gemm: adds to another tensor than it writes")
        if tuple(out.shape) != (a.shape[0], b.shape[1]) or a.shape[1] != b.shape[0]:
            self.faults.append(f"gemm: {list(a.shape)} x {list(b.shape)} -> {list(out.shape)}")
        for name, x in (("a", a), ("b", b), ("out", out)):
            if x.numel() and not _fits_blas(x):
                self.faults.append(f"gemm: {name} {list(x.shape)} is copied, its strides are {list(x.stride())}")
        return out

    def compare(self, name: str, got: Any, want: Any) -> None:
        pairs = zip(*((x if isinstance(x, (tuple, list)) else (x,)) for x in (got, want)), strict=True)
        for i, (a, b) in enumerate(pairs):
            if _looks(a) != _looks(b):
                self.faults.append(f"{name}: result {i} is {_looks(a)}, its fake implementation says {_looks(b)}")

    def backward(self) -> None:
        """The backwards of all ops that were called with inputs that want a gradient, for every kind of upstream."""
        for op, inputs, context, outputs in self.backwards:
            count = sum(id(x) not in context.constants for x in outputs)
            for only in (None, *range(count)) if count > 1 else (None, 0):
                self._backward(op, inputs, context, outputs, only)

    def _backward(
        self, op: CustomOpDef, inputs: tuple[Any, ...], context: _Context, outputs: tuple[Tensor, ...], only: int | None
    ) -> None:
        """only: the one differentiable output with a gradient, expanded from a number as that of a sum is."""
        numbers = iter(range(len(outputs)))
        upstream: list[Tensor | None] = []
        for x in outputs:
            given = id(x) not in context.constants and only in (None, next(numbers))
            whole = only is None
            upstream.append((torch.empty_like(x) if whole else x.new_empty(()).expand(x.shape)) if given else None)
        gradients = op._backward_fn(context, *upstream)  # type: ignore[misc]
        if len(gradients) != len(inputs):
            self.faults.append(f"{op._qualname}: {len(gradients)} gradients for {len(inputs)} inputs")
        for i, (gradient, x) in enumerate(zip(gradients, inputs, strict=False)):
            if gradient is not None and _looks(gradient)[::2] != _looks(x)[::2]:
                self.faults.append(f"{op._qualname}: gradient {i} is {_looks(gradient)}, the input {_looks(x)}")


def _fits_blas(x: Tensor) -> bool:
    (rows, columns), (a, b) = x.shape, x.stride()
    return (b == 1 and a >= max(1, columns)) or (a == 1 and b >= max(1, rows))


def _looks(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), tuple(x.stride()), (x.dtype, x.device)


class _Context:
    """What autograd hands to an op's `setup_context` and backward."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        self.saved_tensors: tuple[Tensor, ...] = ()
        self.constants: set[int] = set()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constants |= {id(x) for x in tensors}

    def set_materialize_grads(self, value: bool) -> None:
        pass


_now: list[DryRun] = []  # the run in progress


class _Compiled:
    """Stands where Triton's compiled kernel does."""

    function = packed_metadata = None

    def __init__(self, source: Any, target: Any, options: Mapping[str, Any]) -> None:
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        promises = frozenset(names[path[0]] for path, hints in source.attrs.items() if ["tt.divisibility", 16] in hints)
        left = {name: type_ for name, type_ in source.signature.items() if type_ != "constexpr"}
        self._names = names
        self._launch = Launch(
            source.fn, left, promises, constants, num_warps=options["num_warps"], num_stages=options["num_stages"]
        )

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: Any, function: Any, metadata: Any, *rest: Any) -> None:
        _now[-1].launch(self._launch, (x, y, z), dict(zip(self._names, rest[3:], strict=True)))


class _Waited(Exception):
    """For a value that fake tensors do not have."""


def _data_ptr(x: FakeTensor) -> int:
    return BASE + int(x.storage_offset()) * x.element_size() if x.numel() else 0


def _tolist(x: FakeTensor) -> list[int]:
    _now[-1].read("tolist")
    return list(_now[-1].allowed.bounds)


def _call(op: CustomOpDef, *inputs: Any) -> Any:
    """In place of `CustomOpDef.__call__`, which would take the fake implementation."""
    run = _now[-1]
    with torch.no_grad():
        got = op._init_fn(*inputs)
        if op._abstract_fn is not None:
            run.compare(op._qualname, got, op._abstract_fn(*inputs))
    context = _Context(inputs)
    if op._backward_fn is not None and torch.is_grad_enabled() and any(context.needs_input_grad):
        if op._setup_context_fn is not None:
            op._setup_context_fn(context, inputs, got)
        run.backwards.append((op, inputs, context, got if isinstance(got, tuple) else (got,)))
    return got


class _Host(TorchFunctionMode):
    """Sees what the host asks of fake tensors, and does what a torch without CUDA cannot do with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run, first = _now[-1], args[0] if args else None
        if isinstance(first, FakeTensor) and first.is_cuda:
            if func in (torch.mm, torch.addmm) and "out_dtype" in kwargs:
                a, b = args[-2:]
                return run.gemm(a, b, kwargs["out"], None if func is torch.mm else first)
            if func is torch.Tensor.nonzero:
                run.read("nonzero")
                return torch.empty(run.allowed.rows, first.ndim, dtype=torch.int64, device=first.device)
            if func in _HOST_READS:
                run.read(func.__name__)
                raise _Waited
            if func is torch.Tensor.__getitem__:
                return _index(*args)
            if func is torch.Tensor.__setitem__:
                into = _index(*args[:2])
                write = torch.ops.aten.copy_ if isinstance(args[2], Tensor) else torch.ops.aten.fill_
                return write(into, args[2])
            if func is torch.Tensor.contiguous:
                return first if first.is_contiguous() else first.clone(memory_format=torch.contiguous_format)
        result = _apply(func, args, kwargs)
        if isinstance(result, FakeTensor) and not result.is_cuda and isinstance(first, FakeTensor) and first.is_cuda:
            run.read(f"{func.__name__} to the CPU")
        return result


def _apply(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """func(*args, **kwargs); of autograd only that what comes of a tensor that wants a gradient wants one, too.

    Its nodes ask for CUDA's streams.
    """
    tracked = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    with torch.no_grad() if tracked else contextlib.nullcontext():
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if "not linked" not in str(error):
                raise
            result = getattr(torch.ops.aten, _NAMES.get(func.__name__, func.__name__))(*args, **kwargs)
    if tracked and func is not torch.Tensor.detach and isinstance(result, Tensor) and result.is_floating_point():
        result.requires_grad_()
    return result


def _index(x: Tensor, key: Any) -> Tensor:
    """x[key], by operators that need no CUDA."""
    dim = 0
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, slice):
            start, stop, step = part.indices(x.shape[dim])
            x = torch.ops.aten.slice(x, dim, start, max(start, stop), step)
            dim += 1
        elif part is None:
            x = torch.ops.aten.unsqueeze(x, dim)
            dim += 1
        elif isinstance(part, int):
            x = torch.ops.aten.select(x, dim, part)
        else:
            if part.dtype == torch.bool:
                _now[-1].read("boolean key")
                raise _Waited
            x = torch.ops.aten.index(x, [None] * dim + [part])
            dim += 1
    return x


@functools.cache
def install() -> FakeTensorMode:
    """Patch torch and triton, once; the mode in which tensors on "cuda" are fake."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver: dict[str, Any] = {"device": lambda: 0, "stream": lambda _: 0, "target": lambda: GPUTarget("cuda", 90, 32)}
    triton.compiler.compile = _Compiled
    triton.runtime.driver.set_active(types.SimpleNamespace(**{f"get_current_{k}": v for k, v in driver.items()}))
    FakeTensor.data_ptr = _data_ptr  # type: ignore[assignment,method-assign]
    FakeTensor.tolist = _tolist  # type: ignore[assignment,method-assign]
    CustomOpDef.__call__ = _call  # type: ignore[method-assign]
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132)
    cuda.device_of = lambda _: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: _now[-1].capturing
    return FakeTensorMode()


@contextlib.contextmanager
def dry_run(reads: Reads | None = None, capturing: bool = False, odd: Iterable[str] = ()) -> Iterator[DryRun]:
    """Tensors that the block makes on "cuda" are fake; when it ends, the backwards of its ops run.

    A wait for a value that fake tensors do not have ends the block, and is a fault.
    """
    run = DryRun(reads or Reads(), capturing, frozenset(odd))
    _now.append(run)
    try:
        with install(), _Host():
            yield run
            with torch.no_grad():
                run.backward()
    except (_Waited, DynamicOutputShapeException) as error:
        if not isinstance(error, _Waited):
            run.faults.append(f"host sync: {error.func}")
    finally:
        _now.pop()
    if tuple(run.reads) != run.allowed.expected:
        run.faults.append(f"host syncs: {run.reads}, not {list(run.allowed.expected)}")
