"""FusedGRPOTrainer against TRL's own trainer: whole runs, LoRA on body and head, and what is refused.

Losses and gradients option by option are compared in tests/ops/test_trl_parity.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs TRL 1.16: pip install 'fastgrpo[trl]'")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402

from fastgrpo.integrations.trl import FusedGRPOTrainer  # noqa: E402
from fastgrpo.integrations.trl_head import FusedHead, refuse_sharded  # noqa: E402
from fastgrpo_kernels import watch_plans  # noqa: E402

STEPS = 3
TOLERANCE = 1e-5


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 17) for text in completions]


def make(kind: Any, helpers: Any, folder: Path, model: Any = None, peft_config: Any = None, **options: Any) -> Any:
    """A trainer of three steps of two micro-batches of four completions each, by plain SGD.

    SGD, because Adam makes steps of full size from gradients that are rounding noise around zero.
    """
    if model is None:
        model = helpers.make_model(tie_word_embeddings=False)
        model.save_pretrained(folder / "base")
        model.config._name_or_path = str(folder / "base")  # where TRL loads a reference model from
    defaults: dict[str, Any] = {
        "output_dir": str(folder / kind.__name__),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "optim": "sgd",
        "learning_rate": 0.05,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return kind(
            model,
            reward,
            trl.GRPOConfig(**defaults | options),
            Dataset.from_dict({"prompt": ["ab", "cde", "fghij", "k"] * 4}),
            eval_dataset=Dataset.from_dict({"prompt": ["ab", "cde"]}),
            processing_class=helpers.make_tokenizer(),
            peft_config=peft_config,
        )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_same_runs(helpers: Any, folder: Path, **options: Any) -> None:
    """Losses, metrics and final weights of three steps, and an evaluation after them."""
    runs = []
    for kind in (trl.GRPOTrainer, FusedGRPOTrainer):
        trainer = make(kind, helpers, folder, **copy.deepcopy(options))
        before = weights(trainer)
        trainer.train()
        trainer.evaluate()
        runs.append((trainer, farthest(before, weights(trainer))))
    (theirs, moved), (ours, _) = runs
    assert moved > 100 * TOLERANCE
    assert farthest(weights(theirs), weights(ours)) <= TOLERANCE
    assert len(theirs.state.log_history) == len(ours.state.log_history) == STEPS + 2
    for expected, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert set(expected) == set(found)
        for name in expected:
            if any(clock in name for clock in ("time", "per_second")):
                continue
            if expected[name] is None:  # the mean over no sequences at all
                assert found[name] is None, name
            else:
                assert found[name] == pytest.approx(expected[name], abs=TOLERANCE, rel=TOLERANCE), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"loss_type": "grpo"}, id="grpo"),
        pytest.param({"loss_type": "dapo"}, id="dapo"),
        pytest.param({"loss_type": "dr_grpo", "scale_rewards": "none"}, id="dr_grpo"),
        pytest.param(
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 3e-3},
            id="gspo",
        ),
        pytest.param({"loss_type": "dapo", "beta": 0.05, "num_iterations": 2}, id="kl-two-iterations"),
        pytest.param({"loss_type": "dapo", "mask_truncated_completions": True}, id="truncated-masked"),
        pytest.param({"loss_type": "dapo", "steps_per_generation": 4, "temperature": 0.7}, id="stale-generation"),
        pytest.param({"loss_type": "grpo", "cast_lm_head_to_fp32": True}, id="fp32-head"),
    ],
)
def test_three_steps_are_trls(options: dict[str, Any], helpers: Any, tmp_path: Path) -> None:
    assert_same_runs(helpers, tmp_path, **options)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_lora_on_the_body(beta: float, helpers: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    options = {"beta": beta, "num_iterations": 2, "learning_rate": 1.0}
    assert_same_runs(helpers, tmp_path, peft_config=config, **options)


def test_autocast_trains_close_to_fp32(helpers: Any, tmp_path: Path) -> None:
    """bf16 products under autocast, the reference model's as well; the same first rollouts, hence losses to compare."""
    first = []
    for bf16 in (False, True):
        trainer = make(
            FusedGRPOTrainer, helpers, tmp_path, bf16=bf16, beta=0.05, num_iterations=2, loss_type="dapo", max_steps=2
        )
        trainer.train()
        first.append(next(line for line in trainer.state.log_history if "loss" in line))
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    exact, rounded = first
    assert rounded["kl"] == pytest.approx(exact["kl"], abs=1e-2)
    assert rounded["entropy"] == pytest.approx(exact["entropy"], rel=1e-2)
    assert rounded["entropy"] != exact["entropy"]
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.5)


def test_a_trained_copy_of_the_head(helpers: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_same_runs(helpers, tmp_path, peft_config=config)


def head_lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"], **options})


class DenseTrainer(trl.GRPOTrainer):  # type: ignore[name-defined]
    """By hand: the dapo loss with an on-policy ratio, from the dense logits of the PEFT model's own forward."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("peft_config")
        head = model.lm_head
        # TRL refuses the adapter because of its own head, which is not used here.
        model.get_output_embeddings = lambda: head.base_layer
        super().__init__(model, *args, **kwargs)
        del model.get_output_embeddings

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        prompt, completion, mask = (inputs[k] for k in ("prompt_ids", "completion_ids", "completion_mask"))
        ids = torch.cat([prompt, completion], dim=1)
        attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, prompt.shape[1] - 1 : -1]
        logprob = logits.log_softmax(-1).gather(2, completion.unsqueeze(2))[..., 0]
        ratio = (logprob - logprob.detach()).exp()
        return -(ratio * inputs["advantages"][:, None] * mask).sum() / inputs["num_items_in_batch"]


def test_lora_on_the_head_trains_as_the_dense_computation(helpers: Any, tmp_path: Path) -> None:
    """TRL refuses it. Three steps against the PEFT model's own logits, which are formed here."""
    options = {"loss_type": "dapo", "learning_rate": 1.0, "seed": 5}
    with pytest.raises(ValueError, match="lm_head"):
        make(trl.GRPOTrainer, helpers, tmp_path, peft_config=head_lora(), **options)
    torch.manual_seed(5)
    dense = make(
        DenseTrainer,
        helpers,
        tmp_path,
        model=peft.get_peft_model(helpers.make_model(tie_word_embeddings=False), head_lora()),
        **options,
    )
    before = weights(dense)
    dense.train()
    # Made only now: making a trainer seeds what its run draws.
    ours = make(FusedGRPOTrainer, helpers, tmp_path, peft_config=head_lora(), **options)
    assert farthest(before, weights(ours)) == 0
    ours.train()
    after = weights(ours)
    assert farthest(after, weights(dense)) <= TOLERANCE
    for part in ("lora_A", "lora_B"):
        [name] = [name for name in before if f"lm_head.{part}" in name]
        assert (after[name] - before[name]).abs().max() > 100 * TOLERANCE, part
    assert ours.model.lm_head.base_layer.weight.equal(helpers.make_model(tie_word_embeddings=False).lm_head.weight)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (dense, ours)]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)


def test_the_reference_of_a_head_adapter_is_the_model_without_it(helpers: Any, tmp_path: Path) -> None:
    """KL is 0 before the first step and grows after it; the merged model's log-probabilities are ours."""
    trainer = make(
        FusedGRPOTrainer, helpers, tmp_path, peft_config=head_lora(), beta=0.05, num_iterations=2, learning_rate=1.0
    )
    trainer.train()
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-4
    trainer.model.eval()
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 6)[0]
        merged = trainer.model.merge_and_unload()
        logits = merged(input_ids=ids).logits[:, 2:-1]
        exact = logits.log_softmax(-1).gather(2, ids[:, 3:, None])[..., 0]
    assert (ours - exact).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_dropout": 0.1}, "LoRA dropout"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_head_adapters_that_are_refused(options: dict[str, Any], match: str, helpers: Any, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=match):
        make(FusedGRPOTrainer, helpers, tmp_path, peft_config=head_lora(**options))


def test_a_head_adapter_needs_a_loaded_model(helpers: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected a loaded model"):
        make(FusedGRPOTrainer, helpers, tmp_path, model="some/name", peft_config=head_lora())


def test_disabled_dropout_on_the_head_is_fine(helpers: Any, tmp_path: Path) -> None:
    make(FusedGRPOTrainer, helpers, tmp_path, peft_config=head_lora(lora_dropout=0.1), disable_dropout=True)


def test_several_active_and_merged_adapters_are_refused(helpers: Any) -> None:
    model = peft.get_peft_model(helpers.make_model(tie_word_embeddings=False), head_lora())
    model.add_adapter("second", head_lora())
    head = FusedHead(model.get_base_model(), 1.0)
    hidden, target = torch.randn(3, 32), torch.tensor([5, 6, 7])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(NotImplementedError, match="several active adapters"):
        head.logprob(hidden, target)
    model.set_adapter("default")
    head.logprob(hidden, target)
    model.merge_adapter()
    with pytest.raises(NotImplementedError, match="merged"):
        head.logprob(hidden, target)


def test_liger_is_refused(helpers: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel"):
        make(FusedGRPOTrainer, helpers, tmp_path, use_liger_kernel=True)


def test_sharded_and_quantised_heads_are_refused(helpers: Any, tmp_path: Path, monkeypatch: Any) -> None:
    zero3 = torch.nn.Parameter(torch.zeros(0))
    zero3.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        refuse_sharded(zero3)
    with pytest.raises(NotImplementedError, match="quantised"):
        refuse_sharded(torch.zeros(4, 1, dtype=torch.uint8))
    monkeypatch.setattr(trl.GRPOTrainer, "is_fsdp_enabled", True, raising=False)
    monkeypatch.setattr("fastgrpo.integrations.trl.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match="shard the LM head"):
        make(FusedGRPOTrainer, helpers, tmp_path)


def test_a_dtensor_head_is_refused(helpers: Any, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = helpers.make_model(tie_word_embeddings=False)
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        with pytest.raises(NotImplementedError, match="DTensor"):
            FusedHead(model, 1.0)
    finally:
        dist.destroy_process_group()


def test_a_head_of_another_kind_is_refused(helpers: Any) -> None:
    model = helpers.make_model(tie_word_embeddings=False)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"not one plain torch\.nn\.Linear"):
        FusedHead(model, 1.0)


def test_advantages_per_token_are_refused(helpers: Any, tmp_path: Path) -> None:
    trainer = make(FusedGRPOTrainer, helpers, tmp_path)
    mask = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="advantages: expected one per completion"):
        trainer._compute_loss(trainer.model, {"completion_mask": mask, "advantages": torch.ones(2, 3)})


def test_rows_that_do_not_train_never_meet_the_head(helpers: Any, tmp_path: Path, monkeypatch: Any) -> None:
    rows = []
    loss = FusedHead.loss

    def counted(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(hidden.shape[0])
        return loss(self, hidden, *args, **kwargs)

    monkeypatch.setattr(FusedHead, "loss", counted)
    trainer = make(FusedGRPOTrainer, helpers, tmp_path, mask_truncated_completions=True, max_completion_length=40)
    trained = []
    compute = trainer._compute_loss

    def noted(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["completion_mask"]
        trained.append((int(mask.sum()), mask.numel()))
        return compute(model, inputs)

    trainer._compute_loss = noted
    trainer.train()
    assert rows == [count for count, _ in trained]
    assert sum(rows) < sum(padded for _, padded in trained)


@pytest.mark.parametrize("frozen", [False, True])
def test_gemms_of_a_step(frozen: bool, helpers: Any, tmp_path: Path) -> None:
    """Three for loss and gradients, two with a frozen head; TRL's own take one more each."""
    trainer = make(FusedGRPOTrainer, helpers, tmp_path, max_steps=1, loss_type="dapo")
    trainer.model.get_output_embeddings().weight.requires_grad_(not frozen)
    with watch_plans() as plans:
        trainer.train()
    assert [(plan.schedule, plan.gemms) for plan in plans if plan.gemms > 1] == [("fused", 3 - frozen)] * 2


def test_generation_is_untouched(helpers: Any, tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    plain = helpers.make_model(tie_word_embeddings=False)
    trainer = make(FusedGRPOTrainer, helpers, tmp_path)
    ids = torch.tensor([[1, 7, 9]])
    with torch.no_grad():
        assert trainer.model(input_ids=ids).logits.equal(plain(input_ids=ids).logits)
        loss = trainer.model(input_ids=ids, labels=ids).loss
        assert loss.equal(plain(input_ids=ids, labels=ids).loss)
        with pytest.raises(ValueError, match="labels"):
            trainer.model(input_ids=ids, fused_lm_head=True)


def test_two_processes_are_trls(tmp_path: Path) -> None:
    """DistributedDataParallel on the CPU: sums over processes in denominators, entropy quantile and metrics."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    import helpers as beside

    torch.set_num_threads(1)
    options: dict[str, Any] = {"loss_type": "dapo", "beta": 0.05, "num_iterations": 2}
    options |= {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "per_device_train_batch_size": 2}
    assert_same_runs(beside, Path(sys.argv[1]) / os.environ["RANK"], **options)
    assert torch.distributed.get_world_size() == 2
