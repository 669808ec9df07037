"""The ops are PyTorch ops: opcheck, torch.compile, checkpointing, autocast, strides, modes without gradients."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels import (
    GroupRewards,
    LoRADelta,
    LossConfig,
    gae,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    token_logprob,
    watch_plans,
)

Tensors = dict[str, Tensor]
LENGTHS = [3, 4, 0, 2, 5]
SHARED: dict[str, Any] = {"beta": 0.1, "entropy_coef": 0.05, "sampling_correction": "token_truncate"}
TOKEN, SEQUENCE = LossConfig(**SHARED), LossConfig(importance_sampling_level="sequence", **SHARED)
PER_ROW = LossConfig(importance_sampling_level="sequence", beta=0.1)
HEAD: dict[str, Any] = {"logit_scale": 1.4, "softcap": 5.0, "temperature": 0.8}


def make(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
    """Every tensor that any of the calls takes."""
    g = torch.Generator().manual_seed(seed)
    n, s, d, v, r = sum(lengths), len(lengths), 6, 19, 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = {"hidden": normal(n, d), "weight": normal(v, d), "bias": normal(v), "a": normal(r, d), "b": normal(v, r)}
    tensors |= {"logits": normal(n, v), "target": torch.randint(0, v, (n,), generator=g)}
    tensors |= {name: -1 - normal(n).abs() for name in ("logprob", "old", "ref", "sampling")}
    tensors |= {"entropy": normal(n).abs(), "rewards": normal(s), "advantage": normal(s)}
    tensors |= {"group_index": torch.arange(s) // 2, "token_rewards": normal(n), "values": normal(n)}
    tensors |= {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
    tensors |= {"mask": torch.rand(n, generator=g) < 0.7, "num_tokens": torch.tensor(23.0)}
    return tensors


def _loss_options(t: Tensors) -> dict[str, Any]:
    names = {"old_logprob": "old", "ref_logprob": "ref", "sampling_logprob": "sampling", "mask": "mask"}
    return {argument: t[name] for argument, name in names.items()}


def _lora(t: Tensors) -> LoRADelta:
    return LoRADelta(t["a"], t["b"], 0.5)


def _grpo_loss(t: Tensors, config: LossConfig = TOKEN) -> tuple[Tensor, ...]:
    record = GroupRewards(t["rewards"], t["group_index"])
    options = {"entropy": t["entropy"], "num_sequences": 7, "num_tokens": t["num_tokens"], **_loss_options(t)}
    out = grpo_loss(t["logprob"], record, t["cu_seqlens"], config=config, **options)
    return out.loss, *out.metrics.values()


def _grpo_loss_plain(t: Tensors) -> tuple[Tensor, ...]:
    return (grpo_loss(t["logprob"], t["advantage"], t["cu_seqlens"], old_logprob=t["old"]).loss,)


def _linear_logprob(t: Tensors, **options: Any) -> tuple[Tensor, ...]:
    options = {"bias": t["bias"], "lora": _lora(t), **HEAD, **options}
    return linear_logprob(t["hidden"], t["weight"], t["target"], **options)


def _linear_grpo_loss(t: Tensors, config: LossConfig = TOKEN, **options: Any) -> tuple[Tensor, ...]:
    options = {"bias": t["bias"], "lora": _lora(t), **HEAD, **_loss_options(t), **options}
    record = options.pop("advantage", None)
    if record is None:
        record = GroupRewards(t["rewards"], t["group_index"])
    out = linear_grpo_loss(t["hidden"], t["weight"], t["target"], record, t["cu_seqlens"], config=config, **options)
    return out.loss, out.logprob, *out.metrics.values()


class Call(NamedTuple):
    """An op's use: outputs from the tensors of `make`, and which of those may want a gradient."""

    op: Callable[[Tensors], tuple[Tensor, ...]]
    wanted: tuple[str, ...]

    def inputs(self, **options: Any) -> Tensors:
        return {k: x.requires_grad_(k in self.wanted) for k, x in make(**options).items()}

    def __call__(self, t: Tensors, op: Callable[[Tensors], tuple[Tensor, ...]] | None = None) -> list[Tensor]:
        """Outputs, then gradients with respect to what wants one."""
        outputs = (op or self.op)(t)
        leaves = [t[name] for name in self.wanted if t[name].requires_grad]
        gradients = torch.autograd.grad(total(outputs), leaves) if leaves else ()
        return [*(x.detach() for x in outputs), *gradients]


def total(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar with an upstream gradient of its own for every element of a differentiable output."""
    ramps = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) for x in outputs]
    return torch.stack([(r * x).sum() for r, x in zip(ramps, outputs, strict=True) if x.requires_grad]).sum()


LORA, ROWS = ("hidden", "weight", "bias", "a", "b"), ("hidden", "a")
CALLS = {
    "token_logprob": Call(lambda t: token_logprob(t["logits"], t["target"], softcap=3.0, temperature=0.7), ("logits",)),
    "grpo_loss": Call(_grpo_loss, ("logprob", "entropy")),
    "grpo_loss plain": Call(_grpo_loss_plain, ("logprob",)),
    "linear_logprob": Call(_linear_logprob, LORA),
    "linear_logprob per row": Call(lambda t: _linear_logprob(t, entropy_gradient=False), ROWS),
    "linear_grpo_loss": Call(_linear_grpo_loss, LORA),
    "linear_grpo_loss recomputed": Call(lambda t: _linear_grpo_loss(t, SEQUENCE, chunk_size=2), LORA),
    "linear_grpo_loss per row": Call(lambda t: _linear_grpo_loss(t, PER_ROW, chunk_size=3), ROWS),
}
CONSTANT = {
    "gae": Call(lambda t: gae(t["token_rewards"], t["values"], t["cu_seqlens"], gamma=0.9), ()),
    "group_advantages": Call(
        lambda t: (group_advantages(t["rewards"], t["group_index"], baseline="none", scale="batch"),), ()
    ),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
every_op = pytest.mark.parametrize("call", [*CALLS.values(), *CONSTANT.values()], ids=[*CALLS, *CONSTANT])
OPS = [
    *(f"{name}.op:_{name}" for name in ("token_logprob", "grpo_loss", "linear_logprob", "linear_grpo_loss", "gae")),
    *("group_advantages.op:_group_advantages", "token_logprob.op:_token_logprob_backward"),
    *("linear_logprob.op:_linear_logprob_backward", "gradients:_scale_gradient", "gradients:_scale_rows_of_gradient"),
]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    """The arguments with which each custom op is called, by `module:name`."""
    calls: dict[str, list[tuple[Any, ...]]] = {where: [] for where in OPS}
    for where in OPS:
        module_name, name = where.split(":")
        module = importlib.import_module(f"fastgrpo_kernels.{module_name}")

        original = getattr(module, name)

        def record(*arguments: Any, op: Any = original, where: str = where) -> Any:
            enabled = torch.is_grad_enabled()
            leaves = (
                x.detach().requires_grad_(enabled and x.requires_grad) if isinstance(x, Tensor) else x
                for x in arguments
            )
            calls[where].append((op, *leaves))
            return op(*arguments)

        monkeypatch.setattr(module, name, record)
    return calls


def test_call_plans_are_what_their_names_say() -> None:
    with watch_plans() as plans:
        for name, call in CALLS.items():
            if name.startswith("linear"):
                call(call.inputs())
    assert [plan.schedule for plan in plans] == ["recomputed", "per_row", "fused", "recomputed", "per_row"]


def test_opcheck(recorded: dict[str, list[tuple[Any, ...]]]) -> None:
    for call in (*CALLS.values(), *CONSTANT.values()):
        call(call.inputs())
    assert all(recorded.values())
    for (op, *arguments), *_ in recorded.values():
        torch.library.opcheck(op, tuple(arguments))


@pytest.mark.parametrize("name", ["linear_logprob", "linear_grpo_loss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(
    name: str, dtype: torch.dtype, recorded: dict[str, list[tuple[Any, ...]]]
) -> None:
    call = CALLS[name]
    call(call.inputs(dtype=dtype))
    checked = 0
    for op, *arguments in [calls[0] for where, calls in recorded.items() if where.startswith(name) and calls]:
        at = next(i for i, x in enumerate(arguments) if isinstance(x, list))
        flag = isinstance(arguments[at + 1], bool)
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        for needs, last in itertools.product(itertools.product([False, True], repeat=5), [False, True][: 1 + flag]):
            for some in (arguments, fakes):
                some[at : at + 1 + flag] = [list(needs), last][: 1 + flag]  # and entropy_gradient
            real = [(x.shape, x.dtype, x.stride()) for x in op(*arguments)]
            with mode:
                assert [(x.shape, x.dtype, x.stride()) for x in op(*fakes)] == real
            checked += 1
    assert checked == (96 if name == "linear_logprob" else 32)


@every_call
def test_meta_tensors(call: Call) -> None:
    want = call(call.inputs())
    got = call({k: x.detach().to("meta").requires_grad_(x.requires_grad) for k, x in call.inputs().items()})
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    assert all(x.is_meta for x in got)


CHANGING = ([3, 4, 2], [5, 1, 6, 2], [2, 9, 0, 1, 1, 3], [4, 4])


@pytest.mark.parametrize("name", ["linear_grpo_loss", "linear_logprob", "linear_grpo_loss per row", "all others"])
def test_compiled_once_for_all_lengths(name: str) -> None:
    others = [CALLS["token_logprob"], CALLS["grpo_loss"], *CONSTANT.values()]
    call = CALLS.get(name) or Call(
        lambda t: tuple(x for other in others for x in other.op(t)),
        tuple(name for other in others for name in other.wanted),
    )
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call.op, backend=counter, fullgraph=True)
    for i, lengths in enumerate(CHANGING):
        inputs = call.inputs(lengths=lengths, seed=i)
        assert_equal(call(inputs, compiled), call(inputs))
        assert counter.frame_count == min(i + 1, 2)


def test_compiled_with_a_config_and_numbers_that_change() -> None:
    def op(t: Tensors, config: LossConfig, num_tokens: int, threshold: Tensor) -> Tensor:
        numbers = {"num_tokens": num_tokens, "num_sequences": num_tokens // 2, "entropy_threshold": threshold}
        return _linear_grpo_loss(t, config, lora=None, **numbers)[0]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, backend=counter, fullgraph=True)
    inputs = make()
    for i, num_tokens in enumerate((11, 23, 31, 40)):
        config = LossConfig(beta=0.1)  # an equal one, not the same
        arguments = inputs, config, num_tokens, torch.tensor(0.5 + i)  # as a float it would be a constant to Dynamo
        assert torch.equal(compiled(*arguments), op(*arguments))
        assert counter.frame_count == min(i + 1, 2)


def test_inductor() -> None:
    torch._dynamo.reset()
    call = Call(lambda t: _linear_grpo_loss(t)[:1], LORA)
    inputs = call.inputs(dtype=torch.float32)
    got = call(inputs, torch.compile(call.op, fullgraph=True))
    for a, b in zip(got, call(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_call
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(call: Call, use_reentrant: bool) -> None:
    inputs = call.inputs()
    names = list(inputs)
    want = call(inputs)[-len(call.wanted) :]

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = call.op(dict(zip(names, tensors, strict=True)))
        return tuple(x for x in outputs if x.dtype == torch.float64)

    outputs = checkpoint(op, *inputs.values(), use_reentrant=use_reentrant)
    constant = call.op(inputs)  # a reentrant checkpoint calls every output differentiable
    total(tuple(x for x, like in zip(outputs, constant, strict=True) if like.requires_grad)).backward()
    assert_equal([inputs[name].grad for name in call.wanted], want)  # type: ignore[misc]


@pytest.mark.parametrize("config", [TOKEN, SEQUENCE, PER_ROW])
def test_autocast_rounds_operands_only(config: LossConfig) -> None:
    call = Call(lambda t: _linear_grpo_loss(t, config, lora=None, chunk_size=3), ("hidden", "weight", "bias"))
    inputs = call.inputs(dtype=torch.float32)
    rounded = {k: x.detach().bfloat16().float() if k in call.wanted else x for k, x in inputs.items()}
    want = call({k: x.requires_grad_(k in call.wanted) for k, x in rounded.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(inputs)
    assert_equal(got, want)
    gradient = got[-2]
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


@every_call
def test_gradcheck(call: Call) -> None:
    inputs = call.inputs(lengths=[2, 0, 3])

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = call.op(inputs | dict(zip(call.wanted, tensors, strict=True)))
        return tuple(x for x in outputs if x.requires_grad)

    assert torch.autograd.gradcheck(op, tuple(inputs[name] for name in call.wanted), fast_mode=True)


def strided(x: Tensor) -> Iterator[Tensor]:
    """The same values in other memory layouts."""
    yield torch.stack([x, x], -1)[..., 0]
    yield torch.stack([x, x])[0] if x.ndim == 0 else torch.cat([x, x])[: x.shape[0]]
    if x.ndim == 2:
        yield x.t().contiguous().t()
        yield torch.cat([x, x], 1)[:, : x.shape[1]]


@every_op
def test_any_strides(call: Call) -> None:
    inputs = call.inputs()
    want = call(inputs)
    for argument, x in inputs.items():
        for other in strided(x.detach()):
            got = call(inputs | {argument: other.requires_grad_(x.requires_grad)})
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_expanded_inputs() -> None:
    call = Call(lambda t: _linear_grpo_loss(t, advantage=t["advantage"]), LORA)
    inputs = call.inputs()
    for name, row in (("advantage", torch.tensor([0.7])), ("old", torch.tensor([-2.0])), ("hidden", torch.randn(1, 6))):
        expanded = row.double().expand(inputs[name].shape)
        wants = inputs[name].requires_grad
        got, want = (call(inputs | {name: x.detach().requires_grad_(wants)}) for x in (expanded, expanded.clone()))
        assert_equal(got, want)


def test_tied_embeddings_get_the_sum() -> None:
    t = make()
    ids = torch.randint(0, 19, (14,), generator=torch.Generator().manual_seed(1))
    tied = t["weight"].clone().requires_grad_()
    _linear_grpo_loss(t | {"hidden": torch.nn.functional.embedding(ids, tied), "weight": tied})[0].backward()
    apart = [t["weight"].clone().requires_grad_() for _ in range(2)]
    _linear_grpo_loss(t | {"hidden": apart[0][ids], "weight": apart[1]})[0].backward()
    torch.testing.assert_close(tied.grad, apart[0].grad + apart[1].grad, rtol=1e-12, atol=1e-14)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["linear_logprob", "linear_grpo_loss", "linear_grpo_loss recomputed"])
def test_only_what_wants_a_gradient_gets_one(name: str) -> None:
    call = CALLS[name]
    full = dict(zip(LORA, call(call.inputs())[-5:], strict=True))
    for needs in itertools.product([False, True], repeat=5):
        inputs = call.inputs()
        for argument, needed in zip(LORA, needs, strict=True):
            inputs[argument].requires_grad_(needed)
        outputs = call.op(inputs)
        assert outputs[0].requires_grad == any(needs)
        if any(needs):
            total(outputs).backward()
        for argument, needed in zip(LORA, needs, strict=True):
            assert (inputs[argument].grad is not None) == needed
            if needed:
                torch.testing.assert_close(inputs[argument].grad, full[argument], rtol=1e-11, atol=1e-13)


@every_call
def test_second_backward_is_the_same(call: Call) -> None:
    inputs = call.inputs()
    value = total(call.op(inputs))
    leaves = [inputs[name] for name in call.wanted]
    first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    assert_equal(list(second), list(first))
    scaled = torch.autograd.grad(-0.5 * value, leaves)
    for a, b in zip(scaled, first, strict=True):
        torch.testing.assert_close(a, -0.5 * b, rtol=1e-13, atol=1e-15)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, leaves)


@every_call
def test_a_penalty_on_the_gradient_raises_and_does_not_vanish(call: Call) -> None:
    for name in call.wanted:
        inputs = call.inputs()
        value = total(call.op(inputs))
        (gradient,) = torch.autograd.grad(value, inputs[name], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            (value + gradient.square().sum()).backward()


@every_op
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(call: Call, mode: Any) -> None:
    want = [x.detach() for x in call.op(call.inputs())]
    with mode():
        got = call.op(call.inputs())
        assert_equal(list(got), want)
    assert not any(x.requires_grad for x in got)


def test_config_survives_copies() -> None:
    for config in (TOKEN, LossConfig(loss_type="cispo", epsilon_high=5.0), LossConfig(max_completion_length=9)):
        for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert other == config
            assert other.encoded == config.encoded
            assert LossConfig.decode(other.encoded) == config
