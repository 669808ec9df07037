"""The command line as a user meets it: help, misspellings, missing things - one clear line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastgrpo.cli import main

_TESTS = Path(__file__).parent
_EXAMPLES = _TESTS.parents[1] / "examples"


def _write(folder: Path, **options: Any) -> str:
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    base = {
        "model": "nowhere/at-all",
        "train_dataset": str(folder / "rows.jsonl"),
        "reward_funcs": ["exact_match"],
        "output_dir": str(folder / "run"),
        "num_prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 1,
        "report_to": [],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**base, **options}.items() if v is not None}))
    return str(path)


def _error(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_help_lists_commands_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"fastgrpo {command}" in text for command in ("train", "eval", "report", "doctor"))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{option}" in text for option in ("learning_rate", "loss_type", "column_mapping", "resume"))


def test_nothing_heavy_is_loaded_before_it_is_needed(tmp_path: Path) -> None:
    """Help, config errors and the package itself come without torch, transformers and datasets."""
    config = _write(tmp_path, learning_rate="fast")
    script = (
        "import sys, contextlib, io\n"
        "import fastgrpo\n"
        "from fastgrpo.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:\n"
        "    assert main(['--help']) == 0\n"
        f"    assert main(['train', {config!r}]) == 2, error\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'rich', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'learning_rate' in error.getvalue()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian', did you mean 'train'?"),
        (["train", "missing.yaml"], "cannot read missing.yaml: No such file or directory"),
        (["train", "--lerning_rate", "1"], "unknown option --lerning_rate, did you mean 'learning_rate'?"),
        (["train"], "model is required"),
        (["report", "missing"], "no such run directory: missing"),
        (["report", str(_EXAMPLES)], "examples holds no run: there is neither a config.yaml nor a metrics.jsonl"),
    ],
)
def test_wrong_commands(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _error(capsys, argv)


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"lerning_rate": 1}, [], "unknown option 'lerning_rate', did you mean 'learning_rate'?"),
        ({"learning_rate": "fast"}, [], "error: learning_rate='fast' must be a number"),
        ({}, ["--loss_type", "gppo"], "error: loss_type='gppo' must be one of grpo, bnpo, "),
        ({}, ["--loss_type=gppo"], "did you mean 'grpo'?"),
        ({}, ["--num_generations", "2.5"], "error: num_generations='2.5' must be a whole number"),
        ({}, ["--gamma", "nan"], "error: gamma='nan' must be a finite number"),
        ({}, ["--column_mapping", "question"], "column_mapping='question' must be a mapping of strings to strings"),
        ({}, ["--reward_weights", "a"], "error: reward_weights='a' must be a list of numbers or null"),
        ({"fused_layers": "perhaps"}, [], "error: fused_layers='perhaps' must be true or false or null"),
        ({}, ["--use_peft"], "error: --use_peft needs a value: true or false"),
        ({}, ["--resume"], "error: --resume needs a value: auto, never or a checkpoint's path"),
        ({"report_to": "mlflow"}, [], "report_to=['mlflow'] must be a list of any of tensorboard, wandb, none"),
        ({"num_generations": 1}, [], "num_generations=1: a group needs 2 or more"),
        ({"reward_funcs": ["exact_mach"]}, [], "did you mean 'exact_match'?"),
        ({"reward_funcs": ["no_module:f"]}, [], "no_module"),
        ({"reward_funcs": None}, [], "reward_funcs is required"),
        ({"train_dataset": "/nowhere/rows.jsonl"}, [], "/nowhere/rows.jsonl"),
        ({"model": "/nowhere/model"}, [], "model='/nowhere/model': no such folder"),
        ({"eval_steps": 20}, [], "eval_steps=20 needs an eval_dataset"),
        ({"rollout_engine": "warp"}, [], "rollout_engine"),
    ],
)
def test_wrong_options(
    options: dict[str, Any], extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in _error(capsys, ["train", _write(tmp_path, **options), *extra])
    assert not (tmp_path / "run").exists()


def test_data_without_rows_prompts_or_sense(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path, model=str(tiny_model_dir))
    rows = tmp_path / "rows.jsonl"
    for contents, message in [
        ("", "rows.jsonl"),
        ('{"question": "x"}\n', "prompt"),
        ('{"prompt": "x"}\n{"prompt": \n', "line 2"),
        ('{"prompt": null}\n{"prompt": "x"}\n', "row 0"),
    ]:
        rows.write_text(contents)
        assert message in _error(capsys, ["train", config])


def test_a_bad_row_is_found_before_anything_starts(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path, model=str(tiny_model_dir))
    rows = '{"prompt": "x"}\n' * 30 + '{"prompt": null}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    assert "row 30" in _error(capsys, ["train", config])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_value_where_a_list_is_meant(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = _write(tmp_path, model=str(tiny_model_dir), reward_funcs="exact_match")
    assert main(["train", config, "--report_to", "none", "--stop_token_ids", "5"]) == 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (resolved["report_to"], resolved["reward_funcs"], resolved["stop_token_ids"]) == (
        ["none"],
        ["exact_match"],
        [5],
    )


def test_the_config_may_be_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _write(tmp_path, lerning_rate=1)
    for argv in (["--config", config], [f"--config={config}"]):
        assert "unknown option 'lerning_rate'" in _error(capsys, ["train", *argv])


def test_the_config_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "CONFIG.yaml comes first" in _error(capsys, ["train", "--seed", "1", _write(tmp_path)])


def test_a_template_that_cannot_be_filled_in(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path, model=str(tiny_model_dir), prompt_template="{prompt:d}")
    assert "prompt_template '{prompt:d}' cannot be filled in" in _error(capsys, ["train", config])


def test_not_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\nb: }")
    assert "is not YAML" in _error(capsys, ["train", str(bad)])
    bad.write_text("seed: 1\nmax_steps: 2\nseed: 3\n")
    assert "bad.yaml: seed is given twice" in _error(capsys, ["train", str(bad)])
    bad.write_text("- just\n- a list\n")
    assert "must hold options" in _error(capsys, ["train", str(bad)])


def test_an_evaluation_without_a_reward_is_no_success(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_nothing.py").write_text(
        "def nothing(completions, **_):\n    return [None for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = _write(tmp_path, model=str(tiny_model_dir), eval_dataset=str(tmp_path / "rows.jsonl"), num_threads=1)
    assert main(["eval", config, "--reward_funcs", "rewards_of_nothing:nothing"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["eval/reward"] is None
    assert "no sample has a reward" in err


def test_train_eval_and_report(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(tmp_path / "rows.jsonl")
    config = _write(tmp_path, model=str(tiny_model_dir), eval_dataset=rows, num_threads=1)
    assert main(["train", config, "--max_steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "step 2/2" in out
    assert "report.html" in out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"] == 2

    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").exists()
    capsys.readouterr()

    assert main(["eval", config]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert {"eval/reward", "eval/accuracy"} <= metrics.keys()


def test_the_resolved_config_is_a_config(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", _write(tmp_path, model=str(tiny_model_dir)), "--disable_progress", "true"]) == 0
    again = ["train", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "other")]
    assert main(again) == 0
    assert (tmp_path / "other" / "summary.json").exists()


def test_modules_beside_the_config_can_be_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "my_task_7.py").write_text(
        "def rows():\n    return [{'prompt': 'a'}, {'prompt': 'b'}]\n"
        "def reward(completions, **_):\n    return [float(len(c)) for c in completions]\n"
        f"def model(seed):\n    assert seed == 11\n    return {str(tiny_model_dir)!r}\n"
    )
    config = _write(
        tmp_path, model="my_task_7:model", train_dataset="my_task_7:rows", reward_funcs=["my_task_7:reward"], seed=11
    )
    assert main(["train", config]) == 0


def test_doctor_takes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in ((["doctor", "--help"], 0), (["doctor", "gpu"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == code
        assert "packages\n" not in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "devices" in text
    assert "attention in the update" in text
    assert "auto          takes loop" in text or torch.cuda.is_available()


@pytest.mark.parametrize(("oldest", "said"), [("0.1", False), ("99", True)])
def test_doctor_offers_no_engine_that_transformers_is_too_old_for(
    oldest: str, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastgrpo.rollout.transformers.OLDEST", oldest)
    assert main(["doctor"]) == 0
    assert (f": transformers {oldest} is needed" in capsys.readouterr().out) == said


@pytest.mark.parametrize("path", sorted(_EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    from fastgrpo.cli import _read_command

    config, resume = _read_command([str(path)], "train")
    assert resume == "auto"
    assert config.loss_config().loss_type == config.loss_type


def test_two_steps_of_the_gsm8k_recipe_on_real_problems(helpers: Any, tmp_path: Path) -> None:
    """examples/gsm8k.yaml with a tiny model and the real lines of tests/data in place of the hub."""
    model = tmp_path / "model"
    helpers.make_model().save_pretrained(model)
    helpers.make_tokenizer().save_pretrained(model)
    data = _TESTS.parent / "data"
    argv = ["train", str(_EXAMPLES / "gsm8k.yaml")]
    for name, value in {
        "model": model,
        "train_dataset": data / "gsm8k_train.jsonl",
        "eval_dataset": data / "gsm8k_test.jsonl",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "num_prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_prompt_length": 450,
        "eval_max_prompts": 3,
        "num_threads": 1,
        "report_to": "[]",
        "mask_truncated_completions": "false",
        "disable_progress": "true",
    }.items():
        argv += [f"--{name}", str(value)]
    assert main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["rewards/math/failed"] == 0 for line in lines[1:])
    assert all(0 <= line["reward"] <= 1 for line in lines[1:])
