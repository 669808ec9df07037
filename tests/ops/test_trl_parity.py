"""The real TRL 1.16: its own `_compute_loss` against our ops, and against the trainer that puts them in its place.

TRL computes in fp32, so that is the precision here. Where TRL divides by something else than losses over a whole
update batch would, the test passes TRL's own denominators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl", reason="needs TRL 1.16: pip install 'fastgrpo[trl]'")

from fastgrpo.integrations.trl import FusedGRPOTrainer  # noqa: E402
from fastgrpo.integrations.trl_head import FusedHead  # noqa: E402
from fastgrpo_kernels import LossConfig, grpo_loss, linear_grpo_loss, linear_logprob  # noqa: E402

from .trl_case import TEMPERATURE, distance, gradients, make_model, make_trainer, micro_batches  # noqa: E402

TOLERANCE = 1e-5
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
BY_SEQUENCE = ("grpo", "sapo", "luspo", "dr_grpo")
VLLM: dict[str, Any] = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_clip_max": 1.2,
    "vllm_importance_sampling_clip_min": 0.8,
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.07, "use_bias_correction_kl": False},
    "kl-corrected": {"beta": 0.07},
    "delta": {"delta": 1.05},
    "entropy-mask": {"top_entropy_quantile": 0.6},
    "off-policy-mask": {"off_policy_mask_threshold": 0.01},
    "token_truncate": {**VLLM, "vllm_importance_sampling_mode": "token_truncate"},
    "token_mask": {**VLLM, "vllm_importance_sampling_mode": "token_mask"},
    "sequence_truncate": {**VLLM, "vllm_importance_sampling_mode": "sequence_truncate"},
    "sequence_mask": {**VLLM, "vllm_importance_sampling_mode": "sequence_mask"},
    "no-upper-bound": {
        **VLLM,
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": None,
    },
    "masks": {"tools": True, "mask_truncated_completions": True},
    "all": {
        **VLLM,
        "beta": 0.07,
        "delta": 1.05,
        "top_entropy_quantile": 0.7,
        "off_policy_mask_threshold": 0.01,
        "vllm_importance_sampling_mode": "token_truncate",
        "tools": True,
    },
}


def cases() -> list[Any]:
    """Every type at every level plainly; every option with a type of each aggregation; everything with every type."""
    chosen = [(t, level, "plain") for t in TYPES for level in LEVELS if (t, level) != ("vespo", "sequence")]
    chosen += [(t, "token", extra) for extra in EXTRAS for t in ("grpo", "dapo") if extra not in ("plain", "all")]
    chosen += [
        (t, "sequence", extra) for extra in ("kl-corrected", "off-policy-mask", "masks") for t in ("grpo", "luspo")
    ]
    chosen += [("vespo", "token", "token_mask"), ("vespo", "token", "no-upper-bound"), ("bnpo", "token", "masks")]
    chosen += [(t, "token", "all") for t in TYPES]
    return [pytest.param(*case, id="-".join(case)) for case in chosen]


def options_of(loss_type: str, level: str, extra: str) -> tuple[dict[str, Any], bool]:
    options = {"loss_type": loss_type, "importance_sampling_level": level, **EXTRAS[extra]}
    options |= {"epsilon": 0.02, "epsilon_high": 1.03 if loss_type == "cispo" else 0.03}
    tools = options.pop("tools", False)
    return options, tools


def config_of(options: dict[str, Any]) -> LossConfig:
    """The options in our words."""
    same = ["loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta"]
    same += ["top_entropy_quantile", "off_policy_mask_threshold"]
    ours = {name: options[name] for name in same if name in options}
    if options.get("use_vllm"):
        upper = options["vllm_importance_sampling_clip_max"]
        ours |= {
            "sampling_correction": options["vllm_importance_sampling_mode"],
            "sampling_clip_max": 1e30 if upper is None else upper,
            "sampling_clip_min": options["vllm_importance_sampling_clip_min"],
        }
    corrected = options.get("use_bias_correction_kl", True)
    return LossConfig(**ours, kl_bias_correction=corrected, max_completion_length=9)


def packed_losses(trainer: Any, batch: dict[str, Tensor], config: LossConfig) -> list[Tensor]:
    """`linear_grpo_loss` and `grpo_loss` of a padded micro-batch's trained tokens, with TRL's denominators."""
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    mask = mask.bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    hidden = trainer.model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    hidden = hidden[:, batch["prompt_ids"].shape[1] - 1 : -1][mask]
    target, weight = batch["completion_ids"][mask], trainer.model.lm_head.weight
    cu_seqlens = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    arguments: dict[str, Any] = {
        f"{name}_logprob": batch[f"{name}_per_token_logps"][mask]
        for name in ("old", "ref", "sampling")
        if f"{name}_per_token_logps" in batch
    }
    accumulation = 2
    if config.loss_type in BY_SEQUENCE:
        # TRL takes the mean over a micro-batch's sequences, then over micro-batches.
        arguments["num_sequences"] = mask.shape[0] * accumulation
    elif config.loss_type == "bnpo":
        # TRL takes the mean over a micro-batch's tokens, then over micro-batches.
        arguments["num_tokens"] = mask.sum() * accumulation
    else:
        # TRL counts the generation batch's tokens, here those of the two micro-batches of a step.
        arguments["num_tokens"] = batch["num_items_in_batch"]
    advantage = batch["advantages"]
    fused = linear_grpo_loss(
        hidden, weight, target, advantage, cu_seqlens, temperature=TEMPERATURE, config=config, **arguments
    )
    logprob, entropy = linear_logprob(hidden, weight, target, temperature=TEMPERATURE)
    apart = grpo_loss(logprob, advantage, cu_seqlens, entropy=entropy, config=config, **arguments)
    return [fused.loss, apart.loss]


@pytest.mark.parametrize(("loss_type", "level", "extra"), cases())
def test_losses_gradients_and_metrics_are_trls(loss_type: str, level: str, extra: str, tmp_path: Path) -> None:
    options, tools = options_of(loss_type, level, extra)
    theirs = make_trainer(trl.GRPOTrainer, tmp_path, **options)
    batches = micro_batches(theirs, tools)
    fused = make_trainer(FusedGRPOTrainer, tmp_path, **options)
    fused.model.load_state_dict(theirs.model.state_dict())
    for trainer in (theirs, fused):
        trainer._metrics["train"].clear()

    expected = [theirs._compute_loss(theirs.model, batch) for batch in batches]
    gradient = gradients(theirs, expected)
    ours = [fused._compute_loss(fused.model, batch) for batch in batches]
    by_op = [packed_losses(theirs, batch, config_of(options)) for batch in batches]
    scale = max(abs(loss.item()) for loss in expected)
    assert scale > 1e-4
    for i, loss in enumerate(expected):
        for other in (ours[i], *by_op[i]):
            assert abs(other.item() - loss.item()) <= TOLERANCE * scale
    assert distance(gradient, gradients(fused, ours)) <= TOLERANCE
    for losses in zip(*by_op, strict=True):
        assert distance(gradient, gradients(theirs, list(losses))) <= TOLERANCE
    their_metrics, our_metrics = theirs._metrics["train"], fused._metrics["train"]
    assert set(their_metrics) == set(our_metrics)
    for name, values in their_metrics.items():
        assert our_metrics[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), name


ENTROPY: dict[str, dict[str, Any]] = {
    "bonus": {"entropy_coef": 0.3},
    "bonus-and-mask": {"entropy_coef": 0.3, "top_entropy_quantile": 0.6},
    "adaptive-raises": {"use_adaptive_entropy": True, "entropy_coef": 0.3, "entropy_target": 9.0},
    "adaptive-lowers": {"use_adaptive_entropy": True, "entropy_coef": 0.3, "entropy_target": 0.1},
}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("extra", sorted(ENTROPY))
def test_the_entropy_bonus_is_trls(loss_type: str, extra: str, tmp_path: Path) -> None:
    """Its denominator is the micro-batch's own tokens whatever divides the policy term; two optimizer steps."""
    options = {"loss_type": loss_type, **ENTROPY[extra]}
    theirs = make_trainer(trl.GRPOTrainer, tmp_path, **options)
    batches = micro_batches(theirs, tools=True)
    fused = make_trainer(FusedGRPOTrainer, tmp_path, **options)
    fused.model.load_state_dict(theirs.model.state_dict())
    theirs._metrics["train"].clear()
    for step in range(2):
        losses: list[list[Tensor]] = []
        for trainer in (theirs, fused):
            losses.append([])
            for i, batch in enumerate(batches):
                trainer.accelerator.gradient_state._set_sync_gradients(i == 1)
                losses[-1].append(trainer._compute_loss(trainer.model, batch))
        expected, ours = losses
        assert torch.stack(ours).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=TOLERANCE)
        assert distance(gradients(theirs, expected), gradients(fused, ours)) <= TOLERANCE
        assert fused.entropy_coef == theirs.entropy_coef, step
    assert ("adaptive" in extra) == (theirs.entropy_coef != 0.3)
    for name in ("policy_loss", "entropy_coef", "entropy"):
        assert fused._metrics["train"][name] == pytest.approx(theirs._metrics["train"][name], rel=1e-4, abs=1e-6), name


def _pair(tmp_path: Path, family: str, **options: Any) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    theirs = make_trainer(trl.GRPOTrainer, tmp_path, family, **options)
    batches = micro_batches(theirs)
    fused = make_trainer(FusedGRPOTrainer, tmp_path, family, **options)
    fused.model.load_state_dict(theirs.model.state_dict())
    return theirs, fused, batches


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Gemma2", "Granite", "Cohere", "Phi", "Qwen3Moe"])
def test_heads_of_other_families(family: str, tmp_path: Path) -> None:
    """Softcap, scales, a bias, tied embeddings, and a mixture of experts' load-balancing loss."""
    theirs, fused, batches = _pair(tmp_path, family, loss_type="dapo")
    expected = [theirs._compute_loss(theirs.model, batch) for batch in batches]
    ours = [fused._compute_loss(fused.model, batch) for batch in batches]
    assert torch.stack(ours).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=TOLERANCE, abs=TOLERANCE)
    assert distance(gradients(theirs, expected), gradients(fused, ours)) <= TOLERANCE
    assert theirs._metrics["train"].get("aux_loss", []) == pytest.approx(fused._metrics["train"].get("aux_loss", []))


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere", "Phi"])
def test_lora_on_a_head_with_scale_cap_or_bias(family: str) -> None:
    """Against the adapted model's own logits, which TRL never uses: log-probabilities and the adapter's gradients."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(family), config)
    ids = torch.randint(3, 37, (2, 8), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1] / TEMPERATURE
    exact = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].flatten()
    hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    found, _ = FusedHead(model.get_base_model(), TEMPERATURE).logprob(hidden, ids[:, 1:].flatten())
    assert (found - exact).abs().max() < TOLERANCE
    adapter = [p for p in model.parameters() if p.requires_grad]
    assert len(adapter) == 2
    upstream = torch.linspace(-1, 1, exact.numel())
    pairs = zip(*(torch.autograd.grad((x * upstream).sum(), adapter) for x in (exact, found)), strict=True)
    assert all((a - b).abs().max() <= TOLERANCE * a.abs().max() for a, b in pairs)


@pytest.mark.parametrize("loss_type", TYPES)
def test_evaluation_does_not_divide_by_accumulation(loss_type: str, tmp_path: Path) -> None:
    theirs, fused, batches = _pair(tmp_path, "Qwen3", loss_type=loss_type)
    for trainer in (theirs, fused):
        trainer.model.eval()
    with torch.no_grad():
        expected = [theirs._compute_loss(theirs.model, batch).item() for batch in batches]
        ours = [fused._compute_loss(fused.model, batch).item() for batch in batches]
    assert ours == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE * max(map(abs, expected)))
    assert not fused._metrics["eval"].keys() ^ theirs._metrics["eval"].keys()


def test_a_micro_batch_without_trained_tokens_gives_zero_gradients(tmp_path: Path) -> None:
    trainer = make_trainer(FusedGRPOTrainer, tmp_path, loss_type="dapo")
    batch = micro_batches(trainer)[0]
    batch["tool_mask"] = torch.zeros_like(batch["completion_mask"])
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == 0
    found = gradients(trainer, [loss])
    assert all((g == 0).all() for g in found.values())


class TestWhereTheyDiffer:
    def test_trls_bnpo_depends_on_the_micro_batches_and_ours_does_not(self, tmp_path: Path) -> None:
        theirs = make_trainer(trl.GRPOTrainer, tmp_path, loss_type="bnpo")
        batches = micro_batches(theirs)
        mask = torch.cat([batch["completion_mask"] for batch in batches])
        whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0] if batches[0][name].dim()}
        split = sum(theirs._compute_loss(theirs.model, batch).item() for batch in batches)
        theirs.current_gradient_accumulation_steps = 1
        joined = theirs._compute_loss(theirs.model, whole).item()
        assert abs(split - joined) > 1e-2 * abs(joined)
        config = LossConfig(loss_type="bnpo")
        total = mask.sum()
        ours = [
            packed_losses(theirs, batch, config)[0] * 2 * batch["completion_mask"].sum() / total for batch in batches
        ]
        assert torch.stack(ours).sum().item() == pytest.approx(joined, rel=TOLERANCE)

    def test_trl_overflows_where_ours_clamps_the_log_ratio(self, tmp_path: Path) -> None:
        theirs, fused, batches = _pair(tmp_path, "Qwen3", loss_type="grpo")
        batch = batches[0]
        batch["advantages"] = -torch.ones(4)
        batch["old_per_token_logps"] = batch["old_per_token_logps"] - 100
        assert not theirs._compute_loss(theirs.model, batch).isfinite()
        loss = fused._compute_loss(fused.model, batch)
        assert loss.item() == pytest.approx(torch.tensor(20.0).exp().item() / 2)
        assert all((g == 0).all() for g in gradients(fused, [loss]).values())

    def test_trls_vespo_counts_padding_when_the_correction_excludes_one(self, tmp_path: Path) -> None:
        """Padded positions have the ratio 1; cut to clip_max < 1, each adds its logarithm to its sequence's weight."""
        cap = 0.8
        options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_truncate"}
        options["vllm_importance_sampling_clip_max"] = cap
        theirs, fused, batches = _pair(tmp_path, "Qwen3", loss_type="vespo", **options)
        batch = batches[0]
        # The five more columns are what TRL itself makes of padding: ids and masks of 0, ratios cut to the cap.
        longer = {
            name: torch.nn.functional.pad(x, (0, 5), value=cap if name == "importance_sampling_ratio" else 0)
            if x.dim() == 2 and not name.startswith("prompt")
            else x
            for name, x in batch.items()
        }
        padding = batch["completion_mask"] == 0
        assert padding.any()
        assert (batch["importance_sampling_ratio"][padding] == cap).all()
        their_losses, our_losses = (
            [trainer._compute_loss(trainer.model, b).item() for b in (batch, longer)] for trainer in (theirs, fused)
        )
        assert our_losses[1] == pytest.approx(our_losses[0], rel=1e-4)
        assert abs(their_losses[1] - their_losses[0]) > 1e-2 * abs(their_losses[0])

    def test_trl_misses_the_softcap_of_recurrent_gemma(self, tmp_path: Path) -> None:
        """It knows `final_logit_softcapping` only, so its log-probabilities are not the model's."""
        theirs, fused, batches = _pair(tmp_path, "RecurrentGemma", loss_type="grpo")
        batch = batches[0]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].shape[1]
        with torch.no_grad():
            logits = theirs.model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, -length - 1 : -1]
            true = (logits / TEMPERATURE).log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2))[..., 0]
            true = true * batch["completion_mask"]
            wrong, right = (
                t._get_per_token_logps_and_entropies(t.model, ids, attention, length)[0] for t in (theirs, fused)
            )
        assert (right - true).abs().max() < 1e-5
        assert (wrong - true).abs().max() > 0.1


def test_half_precision_log_probs_keep_fp32_logits(tmp_path: Path) -> None:
    """A bf16 model: TRL rounds the logits to bf16, ours does not. Against the head in float64."""
    errors = {}
    for kind in (trl.GRPOTrainer, FusedGRPOTrainer):
        trainer = make_trainer(kind, tmp_path, model=make_model("Llama").bfloat16())
        ids = torch.randint(3, 37, (4, 12), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 8)[0].double()
            hidden = trainer.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = hidden[:, 3:-1].double() @ trainer.model.lm_head.weight.double().T / TEMPERATURE
            exact = logits.log_softmax(-1).gather(2, ids[:, 4:, None])[..., 0]
        errors[kind] = (found - exact).abs().max().item()
    assert errors[FusedGRPOTrainer] < 1e-5
    assert errors[trl.GRPOTrainer] > 1e-3
