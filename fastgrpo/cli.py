"""The command `fastgrpo`: train, eval, plan, bench, report, doctor.

Options are read and checked before torch is imported. Every expected error is one line on stderr and exit code 2;
`FASTGRPO_TRACEBACK=1` shows where it came from. A run stopped by a signal, its state saved, exits with 128 + signal.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastgrpo.config import ConfigError, GRPOConfig, RunConfig, hint_of, nearest, wrong_type
from fastgrpo.errors import OtherProcessFailed, RunError
from fastgrpo.option_types import describe
from fastgrpo.options import GROUPS, TaskOptions

_LISTS = ("reward_funcs", "report_to", "stop_token_ids", "stop_strings", "reward_weights")

_USAGE = """usage: fastgrpo COMMAND ...

  fastgrpo train CONFIG.yaml [--option value ...]   train; the same command again goes on where the run stopped
  fastgrpo eval CONFIG.yaml [--option value ...]    sample and score the evaluation prompts, print the figures
  fastgrpo report RUN_DIR                           (re)make RUN_DIR/report.html
  fastgrpo plan CONFIG.yaml [--gpu NAME ...]        predict its memory by part and its seconds by stage
  fastgrpo bench [--suite SUITE] [--peer PEER]      time, memory and correctness beside other packages'
  fastgrpo doctor                                   what this machine offers, and what is missing

fastgrpo COMMAND --help tells more; train --help lists every option."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from fastgrpo import __version__

        print(f"fastgrpo {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "report": _report,
        "plan": _plan,
        "bench": _bench,
        "doctor": _doctor,
    }
    if argv[0] not in commands:
        print(f"fastgrpo: error: unknown command {argv[0]!r}{nearest(argv[0], list(commands))}", file=sys.stderr)
        return 2
    return guarded(lambda: commands[argv[0]](argv[1:]))


def guarded(command: Callable[[], int]) -> int:
    """A command's exit code; 2 for an expected error, which is told in one line on stderr."""
    try:
        return command()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("FASTGRPO_TRACEBACK") or not _expected(error):
            raise
        hint = "" if isinstance(error, (ConfigError, RunError)) else " (FASTGRPO_TRACEBACK=1 shows where)"
        rank = os.environ.get("RANK", "0")
        whose = "" if rank == "0" else f"process {rank}: "
        if not whose or not _told_by_first(error):
            print(f"fastgrpo: error: {whose}{' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2


def _train(argv: list[str]) -> int:
    started = time.perf_counter()
    config, resume = _read_command(argv, "train")
    trainer = _make_trainer(config)
    trainer.started = started
    from fastgrpo.signals import StopRequested

    code = 0
    try:
        trainer.train(resume=resume)
    except StopRequested as stop:
        code = stop.exit_code
    trainer.ranks.leave()
    return code


def _eval(argv: list[str]) -> int:
    import json

    config, _ = _read_command(argv, "eval")
    trainer = _make_trainer(config)
    metrics = trainer.evaluate()
    trainer.ranks.leave()
    scored = not math.isnan(metrics["eval/reward"])
    if trainer.ranks.first:
        print(json.dumps({name: value if value == value else None for name, value in metrics.items()}, indent=2))
        if not scored:
            print("fastgrpo: error: no sample has a reward, so there is no figure", file=sys.stderr)
    return 0 if scored else 1


def _report(argv: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="fastgrpo report", description="Make RUN_DIR/report.html from what the run has written so far."
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--svg", metavar="FILE", type=Path, help="write the reward curve alone, too")
    options = parser.parse_args(argv)
    if not options.run_dir.is_dir():
        raise ConfigError(f"no such run directory: {options.run_dir}")
    if not any((options.run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise ConfigError(f"{options.run_dir} holds no run: there is neither a config.yaml nor a metrics.jsonl")
    from fastgrpo.report import build_report, reward_curve_svg

    print(build_report(options.run_dir))
    if options.svg:
        options.svg.write_text(reward_curve_svg(options.run_dir), encoding="utf-8")
        print(options.svg)
    return 0


def _plan(argv: list[str]) -> int:
    from fastgrpo.plan.command import make_parser, print_table, run

    parser = make_parser()
    asked, rest = parser.parse_known_args(argv)
    if asked.table or asked.into:
        return print_table(asked, rest)
    options = _read_options(rest, "plan", own=[word for a in parser._actions for word in a.option_strings])
    if not options["model"]:
        raise ConfigError("model is required: set it in the config file or with --model")
    config = GRPOConfig(**{f.name: options[f.name] for f in fields(GRPOConfig)})
    return run(asked, options["model"], config)


def _bench(argv: list[str]) -> int:
    """The benchmarks are no part of the installed package: they are found beside it, in a clone."""
    import importlib

    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").exists():
        raise ConfigError("bench runs from a clone of the repository, installed with pip install -e '.[bench]'")
    sys.path.insert(0, str(root))
    return int(importlib.import_module("benchmarks.__main__").main(argv))


def _doctor(argv: list[str]) -> int:
    import argparse

    argparse.ArgumentParser(
        prog="fastgrpo doctor", description="Say what this machine offers, and what each missing package would bring."
    ).parse_args(argv)
    from fastgrpo.doctor import describe_machine

    print(describe_machine())
    return 0


def _make_trainer(config: RunConfig) -> Any:
    from fastgrpo.trainer import GRPOTrainer

    return GRPOTrainer(
        model=config.model,
        reward_funcs=config.reward_funcs,
        args=config.grpo_config(),
        train_dataset=config.train_dataset,
        eval_dataset=config.eval_dataset,
        processing_class=config.processing_class,
    )


def _read_command(argv: list[str], command: str) -> tuple[RunConfig, str]:
    """CONFIG.yaml and overrides -> (every option, resume). The config's folder can be imported from."""
    options = _read_options(argv, command)
    resume = options.pop("resume", "auto")
    return RunConfig(**options), resume


def _read_options(argv: list[str], command: str, own: Iterable[str] = ()) -> dict[str, Any]:
    """Every option's value. own: flags of the command itself, for a misspelt one's nearest."""
    import jsonargparse
    import yaml

    in_file: dict[str, Any] = {}
    parser = jsonargparse.ArgumentParser(
        prog=f"fastgrpo {command}",
        usage=f"fastgrpo {command} CONFIG.yaml [--option value ...]",
        description="CONFIG.yaml holds any of the options below; those of the command line win.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help=jsonargparse.SUPPRESS)
    if command == "train":
        parser.add_argument(
            "--resume",
            type=str,
            default="auto",
            help='"auto": go on from the newest checkpoint in output_dir; "never"; or a checkpoint\'s path.',
        )
    for group in (TaskOptions, *GROUPS):
        parser.add_class_arguments(group)
    known = [a.dest for a in parser._actions if a.dest not in ("help", "config", "print_config")]
    if argv and argv[0].startswith("--config"):  # taken for what it means
        argv = argv[1:] if argv[0] == "--config" else [argv[0].removeprefix("--config="), *argv[1:]]
    if argv and not argv[0].startswith("-"):
        in_file = _read_file(argv[0], known)
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        argv = ["--config", yaml.safe_dump(in_file), *argv[1:]]
    _check_spelling(argv, known, [word.removeprefix("--") for word in own])
    try:
        options = parser.parse_args(_lists(argv)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise _explain(error, argv, in_file) from error
    options.pop("config")
    return dict(options)


def _explain(error: Exception, argv: list[str], in_file: dict[str, Any]) -> ConfigError:
    """The parser's error as one that names the option, the value as it was given, and what was expected."""
    if lacking := re.search(r"argument --(\w+): expected one argument", str(error)):
        name = lacking[1]
        expected = "auto, never or a checkpoint's path" if name == "resume" else describe(hint_of(name))
        return ConfigError(f"--{name} needs a value: {expected}")
    if wrong := re.search(r'Parser key "(\w+)', str(error)):
        name = wrong[1]
        given = [value for word, value in pairwise(argv) if word == f"--{name}"]
        given += [word.partition("=")[2] for word in argv if word.startswith(f"--{name}=")]
        if given or name in in_file:
            return wrong_type(name, given[-1] if given else in_file[name])
        return ConfigError(f"{name} must be {describe(hint_of(name))}")
    return ConfigError(_one_line(error) + ("; CONFIG.yaml comes first" if "unrecognized" in str(error) else ""))


def _lists(argv: list[str]) -> list[str]:
    """`--report_to tensorboard` means a list of one."""
    given = list(argv)
    for i, word in enumerate(given[:-1]):
        if word.removeprefix("--") in _LISTS and not given[i + 1].startswith("["):
            given[i + 1] = f"[{given[i + 1]}]"
    return given


def _read_file(path: str, known: list[str]) -> dict[str, Any]:
    """What the config file holds, its names checked and single values in place of lists made lists."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        contents, written = yaml.safe_load(text), yaml.compose(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(error)}") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} must hold options as 'name: value' lines")
    names = [key.value for key, _ in getattr(written, "value", [])]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"{path}: {twice[0]} is given twice")
    for name, value in contents.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown option {name!r}{nearest(str(name), known)}")
        if name in _LISTS and value is not None and not isinstance(value, list):
            contents[name] = [value]
    return contents


def _check_spelling(argv: list[str], known: list[str], own: list[str]) -> None:
    for word in argv:
        if word.startswith("--") and word not in ("--help", "--config"):
            name = word[2:].split("=")[0].split(".")[0].rstrip("+")
            if name not in known and not name.startswith("print_config"):
                raise ConfigError(f"unknown option --{name}{nearest(name, [*known, *own])}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).replace("Parser key", "option").split())


def _told_by_first(error: Exception) -> bool:
    """Of several processes: options are the same in all, and where another one failed it has said so itself."""
    return isinstance(error, (ConfigError, OtherProcessFailed))


def _expected(error: Exception) -> bool:
    """Errors that are the user's or the machine's, told in one line; anything else is ours and keeps its traceback."""
    return isinstance(error, (ValueError, OSError, ImportError, RunError))
