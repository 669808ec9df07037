"""`LossOutput`: metrics of several calls combine to those of one, in one transfer, without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastgrpo_kernels import LossConfig, LossOutput, grpo_loss

from .cases import CORRECTIONS, LOSS_TYPES, make_case, make_config
from .oracle import Case


def output_of(case: Case, config: LossConfig) -> LossOutput:
    return grpo_loss(
        case.logprob, case.advantage, case.cu_seqlens, entropy=case.entropy, config=config, **case.keywords()
    )


def test_reduce_names_and_empty_members() -> None:
    config = LossConfig(beta=0.1)
    full = output_of(make_case(0, [3, 2]), config)
    empty = output_of(make_case(0, []), config)
    assert set(LossOutput.reduce([full])) == {
        "policy_loss",
        "kl",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
        "sampling/importance_sampling_ratio/min",
        "sampling/importance_sampling_ratio/mean",
        "sampling/importance_sampling_ratio/max",
    }
    assert LossOutput.reduce([empty, full, empty]) == LossOutput.reduce([full])
    nothing = LossOutput.reduce([empty, empty])
    assert nothing.pop("policy_loss") == 0
    assert all(math.isnan(value) for value in nothing.values())
    assert LossOutput.reduce([]) == {}


def test_metrics_are_scalars_that_may_be_missing_in_some_members() -> None:
    with_ref = output_of(make_case(0, [3, 2], sampling=False), LossConfig())
    without = output_of(make_case(1, [4], ref=False, sampling=False), LossConfig())
    assert all(x.ndim == 0 and not x.requires_grad for x in with_ref.metrics.values())
    reduced = LossOutput.reduce([with_ref.metrics, without])
    assert reduced["kl"] == LossOutput.reduce([with_ref])["kl"]
    means = [LossOutput.reduce([x])["entropy"] for x in (with_ref, without)]
    assert reduced["entropy"] == pytest.approx((5 * means[0] + 4 * means[1]) / 9)


def test_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [output_of(make_case(seed, [3, 2]), LossConfig(beta=0.1)) for seed in range(3)]
    transfers = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
            transfers.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    LossOutput.reduce(outputs)
    assert transfers == ["tolist"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_host_sync_off_the_cpu(loss_type: str) -> None:
    """Meta tensors have no values: reading one on the host raises."""
    for correction in CORRECTIONS[: 3 if loss_type == "vespo" else 5]:
        config = make_config(
            loss_type,
            importance_sampling_level="sequence",
            beta=0.1,
            entropy_coef=0.1,
            top_entropy_quantile=0.5,
            off_policy_mask_threshold=0.1,
            sampling_correction=correction,
        )
        logprob, entropy, old, ref, samp = (torch.zeros(6, device="meta") for _ in range(5))
        logprob.requires_grad_()
        output = grpo_loss(
            logprob,
            torch.zeros(2, device="meta"),
            torch.zeros(3, dtype=torch.int32, device="meta"),
            entropy=entropy,
            old_logprob=old,
            ref_logprob=ref,
            sampling_logprob=samp,
            mask=torch.ones(6, dtype=torch.bool, device="meta"),
            config=config,
        )
        output.loss.backward()
        assert logprob.grad is not None
        combined = LossOutput.combine([output, output])
        assert {x.device.type for x in (output.loss, logprob.grad, *combined.values())} == {"meta"}
