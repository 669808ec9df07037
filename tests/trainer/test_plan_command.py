"""`fastgrpo plan` as a user meets it: the figures, what fits, the table, and one line for nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastgrpo.cli import main
from fastgrpo.gpus import GPUS, gpu_of
from fastgrpo.plan.records import PARTS
from fastgrpo.plan.shapes import describe_shape
from fastgrpo.plan.table import BEGIN, CARDS, END, MODELS, make_table, write_table
from fastgrpo.policy.loading import skeleton_of

_DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of a Qwen3-0.6B and nothing else."""
    folder = tmp_path_factory.mktemp("Qwen3-0.6B")
    transformers.AutoConfig.for_model(**MODELS["Qwen3-0.6B"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def record(model: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with these arguments; the record it prints and its exit code."""

    def run(*argv: str) -> tuple[dict[str, Any], int]:
        code = main(["plan", "--model", model, "--json", *argv])
        return json.loads(capsys.readouterr().out), code

    return run


def test_several_processes(record: Any) -> None:
    one, _ = record("--gpu", "H200", "--num_prompts_per_step", "30")
    plan, code = record("--gpu", "H200", "--num_prompts_per_step", "30", "--processes", "8")
    assert code == 0
    assert plan["inputs"]["processes"] == 8
    assert plan["inputs"]["prompts"] == 4
    parameters, policy = plan["inputs"]["parameters"], plan["models"]["policy"]
    assert policy["gradients"] == one["models"]["policy"]["gradients"]
    owned = (policy["weights"] - 2 * parameters) // 4
    assert parameters / 8 <= owned < parameters / 3  # the embedding, a quarter of this model, has one owner
    assert policy["optimizer"] == pytest.approx(8 * owned, rel=1e-4)
    assert plan["seconds"]["update"] < one["seconds"]["update"] / 7
    assert record("--gpu", "H200", "--processes", "8", "--rollout_engine", "loop")[1] == 0


def test_the_record_adds_up(record: Any) -> None:
    plan, code = record("--gpu", "H200", "--beta", "0.1", "--num_minibatches", "2", "--max_completion_length", "1024")
    assert code == 0
    assert plan["fits"] is True
    assert plan["device"]["name"] == "H200"
    assert list(plan["phases"]) == ["rollout", "reference", "old log-probs", "update", "optimizer step"]
    assert plan["peak"] == max(sum(parts.values()) for parts in plan["phases"].values())
    assert plan["peak"] == sum(plan["phases"][plan["peak_phase"]].values())
    # bf16 weights, fp32 masters, fp32 gradients, and AdamW's two moments with 4 bytes a tensor.
    parameters, tensors = plan["inputs"]["parameters"], 28 * 11 + 2
    assert parameters == 596_049_920
    policy = {"weights": 6 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters + 4 * tensors}
    assert plan["models"]["policy"] == policy
    assert plan["models"]["reference"]["weights"] == 2 * parameters
    assert plan["seconds"].keys() == plan["phases"].keys()
    assert plan["inputs"]["prompt_tokens"] == 512
    assert plan["inputs"]["mean_completion"] == 1024


def test_options_move_the_parts_they_are_about(record: Any) -> None:
    # One completion is decoded in steps: fewer tokens are fewer steps.
    base, _ = record("--gpu", "h100")
    lora, _ = record("--gpu", "h100", "--use_peft", "true", "--lora_target_modules", "[q_proj, v_proj]")
    recomputed, _ = record("--gpu", "h100", "--gradient_checkpointing", "true")
    short, _ = record("--gpu", "h100", "--mean-length", "64", "--prompt-length", "100")
    cut, _ = record("--gpu", "h100", "--max_tokens_per_microbatch", "2048")
    # r * (in + out) of q and v in 28 layers.
    assert lora["inputs"]["trainable"] == 16 * ((1024 + 2048) + (1024 + 1024)) * 28
    assert lora["phases"]["update"]["optimizer"] < base["phases"]["update"]["optimizer"] / 100
    assert recomputed["phases"]["update"]["activations"] < base["phases"]["update"]["activations"] / 5
    assert cut["phases"]["update"]["activations"] < base["phases"]["update"]["activations"] / 4
    assert short["seconds"]["rollout"] < base["seconds"]["rollout"]
    assert short["seconds"]["update"] < base["seconds"]["update"]
    assert base["phases"]["optimizer step"]["weights"] == cut["phases"]["optimizer step"]["weights"]


def test_no_word_of_the_table_is_cut(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", model, "--gpu", "h200", "--algorithm", "ppo", "--num_minibatches", "2"])
    text = capsys.readouterr().out
    assert "\u2026" not in text  # an ellipsis
    assert all(part in text for part in PARTS)


def test_ppo_beside_grpo(record: Any) -> None:
    """A critic of the policy's size doubles what lasts but for its value head; GRPO's KL term shares the reference."""
    same = ["--gpu", "h200", "--gradient_checkpointing", "true"]
    grpo, _ = record(*same, "--beta", "0.05")
    ppo, _ = record(*same, "--algorithm", "ppo")
    assert {"values", "critic update", "old log-probs"} == set(ppo["phases"]) - set(grpo["phases"])
    lasting = [sum(sum(model.values()) for model in plan["models"].values()) for plan in (grpo, ppo)]
    assert grpo["models"]["policy"] == ppo["models"]["policy"]
    assert grpo["models"]["reference"] == ppo["models"]["reference"]
    assert 0.52 < lasting[0] / lasting[1] < 0.55
    own = sum(ppo["models"]["policy"].values())
    assert own / (own + sum(ppo["models"]["critic"].values())) == pytest.approx(0.5, abs=1e-4)
    assert sum(grpo["seconds"].values()) < sum(ppo["seconds"].values())
    elsewhere, _ = record(*same, "--algorithm", "ppo", "--critic_model", "some/where")
    assert "critic_model=some/where" in elsewhere["notes"][-1]


def test_what_does_not_fit_is_told_what_would(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--max_completion_length", "1024", "--num_prompts_per_step", "64"]
    argv = ["plan", "--model", model, "--gpu", "4090", *many]
    assert main(argv) == 1
    text = capsys.readouterr().out
    assert "does not fit:\n  with gradient_checkpointing=true:" in text
    assert "use_peft=true" in text
    assert "seconds" not in text
    assert main([*argv, "--gradient_checkpointing", "true"]) == 0
    text = capsys.readouterr().out
    assert "596,049,920 parameters, all train, bfloat16" in text
    assert "fits; max_tokens_per_microbatch could be" in text
    assert "seconds of a rollout batch, 1 optimizer step: rollout" in text
    largest = int(text.split("max_tokens_per_microbatch could be ")[1].split()[0].replace(",", ""))
    checkpointed = [*argv, "--gradient_checkpointing", "true", "--max_tokens_per_microbatch"]
    assert main([*checkpointed, str(largest)]) == 0
    assert main([*checkpointed, str(largest + 1000)]) == 1
    assert main([*argv, "--gpu-memory", "2"]) == 1
    assert "does not fit, nor with checkpointing" in capsys.readouterr().out
    assert main([*argv, "--beta", "0.1", "--sync_ref_model", "true"]) == 1  # which excludes LoRA
    text = capsys.readouterr().out
    assert "with gradient_checkpointing=true:" in text
    assert "use_peft" not in text


def test_where_the_run_would_be(record: Any) -> None:
    here, _ = record("--device", "cpu", "--gradient_checkpointing", "true")
    assert here["device"]["name"] == "CPU"
    assert here["inputs"]["dtype"] == "float32"
    assert here["seconds"] is None
    some, _ = record("--gpu-memory", "500")
    assert some["device"]["memory"] == 500_000_000_000
    assert some["device"]["flops"] is None
    assert some["inputs"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("cuda", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),  # neither an L4 nor an L40S
        ("NVIDIA H20", None),
    ],
)
def test_gpus_by_the_name_that_cuda_gives(cuda: str, name: str | None) -> None:
    assert gpu_of(cuda) == (GPUS[name] if name else None)


@pytest.mark.parametrize("gpu", ["h100", "cpu"])
def test_absurd_sizes_take_no_time(gpu: str, record: Any) -> None:
    """What a plan takes to make does not grow with the batch, or with the tokens that rollouts keep."""
    plan, code = record("--gpu", gpu, "--num_generations", "1000000000000", "--prompt-length", "1000000")
    assert code == 1
    assert plan["inputs"]["group"] == 10**12
    assert plan["peak"] > 10**15


def test_vllm_takes_its_share(record: Any) -> None:
    plan, _ = record("--gpu", "h200", "--rollout_engine", "vllm", "--vllm_args", "{gpu_memory_utilization: 0.5}")
    assert plan["phases"]["rollout"]["cache"] == 141_000_000_000 // 2
    assert "gpu_memory_utilization=0.5" in plan["notes"][0]
    elsewhere = ["--rollout_engine", "vllm_server", "--vllm_server_devices", '["1"]']
    plan, _ = record("--gpu", "h200", *elsewhere)
    assert plan["phases"]["rollout"]["cache"] == 0


def test_a_config_file_is_enough(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model}\nmax_completion_length: 64\nuse_peft: true\n")
    assert main(["plan", str(config), "--gpu", "l40s", "--lora_r", "4"]) == 0
    assert "train, bfloat16" in capsys.readouterr().out


def test_one_is_not_many(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--num_prompts_per_step", "1", "--num_generations", "1", "--algorithm", "reinforce"]
    assert main(["plan", "--model", model, "--gpu", "l40s", "--max_completion_length", "64", *few]) == 0
    text = capsys.readouterr().out
    assert "1 prompt of 512 tokens, 1 completion each" in text
    assert "1 completion decoded at once by" in text
    assert "1 optimizer step:" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "model is required"),
        (["--model", "/nowhere/model"], "model='/nowhere/model': no such folder"),
        (["--model", "MODEL", "--gpu", "h2000"], "--gpu=h2000 is not known, did you mean 'h200'?"),
        (["--model", "MODEL", "--gpu-memory", "0"], "--gpu-memory=0 must be greater than 0"),
        (["--model", "MODEL", "--gpu-memory", "-4"], "--gpu-memory=-4 must be greater than 0"),
        (["--model", "MODEL", "--gpu", ""], "--gpu= is not known"),
        (
            ["--model", "MODEL", "--gpu-memory", "inf"],
            "--gpu-memory=inf must be greater than 0, in GB, and at most 1e9",
        ),
        (["--model", "MODEL", "--max_completion_length", "99999999999"], "more than the 2,147,483,647 that a sequence"),
        (
            ["--table", "--gpu", "h100"],
            "--table is of models and GPUs of its own: it takes --into FILE alone, not --gpu",
        ),
        (["--table", "--nope", "3"], "it takes --into FILE alone, not --nope"),
        (["--table", "--json"], "it takes --into FILE alone, not --json"),
        (["--model", "MODEL", "--prompt-length", "0"], "--prompt-length=0 must be greater than 0"),
        (["--model", "MODEL", "--mean-length", "-1"], "--mean-length=-1 must be greater than 0"),
        (["--model", "MODEL", "--mean-length", "999"], "--mean-length=999 is above max_completion_length=256"),
        (["--model", "MODEL", "--gpu-memroy", "80"], "unknown option --gpu-memroy, did you mean 'gpu-memory'?"),
        (["--model", "MODEL", "--num_generations", "0"], "num_generations=0"),
        (["--model", "MODEL", "--use_peft", "true", "--lora_target_modules", "[z]"], "names no linear layer"),
        (["missing.yaml"], "cannot read missing.yaml"),
    ],
)
def test_nonsense(argv: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *(model if word == "MODEL" else word for word in argv)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "without a config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_help_comes_without_torch() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from fastgrpo.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):\n"
        "    main(['plan', '--help'])\n"
        "assert '--gpu-memory' in text.getvalue()\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_documented_table_is_the_command_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.md"
    for document in (_DOCS / "plan.md", _DOCS.parent / "README.md"):
        page.write_text(document.read_text())
        assert main(["plan", "--table", "--into", str(page)]) == 0
        assert page.read_text() == document.read_text()
    page.write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    write_table(page)
    table = make_table()
    assert page.read_text() == f"a\n{BEGIN}\n{table}\n{END}\nb\n"
    page.write_text(f"{BEGIN}\n")
    assert main(["plan", "--into", str(page)]) == 2
    assert "has no lines" in capsys.readouterr().err
    rows = [line.split("|")[2:-1] for line in table.splitlines()[2:]]
    for row in rows:
        cells = [cell.strip().strip("*").rstrip(")").replace("** (", " (").split(" (") for cell in row]
        for card, needed in cells:
            fitting = [c for c in CARDS if c >= int(needed)]
            assert card == (str(fitting[0]) if fitting else "-")
        for k in range(0, 9, 3):
            grpo, lora, ppo = (int(needed) for _, needed in cells[k : k + 3])
            assert lora < grpo < ppo


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6B", 0.596), ("1.7B", 1.721), ("4B", 4.022), ("8B", 8.191), ("14B", 14.768), ("32B", 32.762)],
)
def test_the_table_s_models_have_their_published_sizes(name: str, billions: float) -> None:
    """Parameters of Qwen's own checkpoints, as their index files add up."""
    from fastgrpo.config import GRPOConfig

    shape = describe_shape(skeleton_of(MODELS[f"Qwen3-{name}"]), GRPOConfig())
    assert round(shape.parameters / 1e9, 3) == billions


def test_only_the_config_of_a_model_is_read(model: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The folder has no weights; a loaded model and a factory's are taken as they are."""
    from fastgrpo.config import GRPOConfig
    from fastgrpo.policy.loading import load_skeleton

    made = load_skeleton(model, GRPOConfig())
    assert {p.device for p in made.parameters()} == {torch.device("meta")}
    assert load_skeleton(made, GRPOConfig()) is made
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tiny = load_skeleton(str(tiny_model_dir), GRPOConfig())
    assert describe_shape(loaded, GRPOConfig()).everything == describe_shape(tiny, GRPOConfig()).everything
    with pytest.raises(ValueError, match="must be a causal language model"):
        load_skeleton(object(), GRPOConfig())
