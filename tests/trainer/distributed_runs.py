"""Starts runs of several processes by distributed_run.py, and compares them."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import runs
import torch
from runs import read_lines, timeless, write_config
from safetensors.torch import load_file

_SCRIPT = Path(__file__).with_name("distributed_run.py")
_PATH = os.pathsep.join(filter(None, [str(_SCRIPT.parent), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": _PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Runs:
    """Starts runs of several processes, one run at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(_SCRIPT)], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder: Path, processes: int = 2, **request: Any) -> list[int]:
        """The process ids, by rank."""
        self.log = folder / "output"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            request |= {"port": free.getsockname()[1], "log": str(self.log), "processes": processes}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._read()

    def end(self) -> tuple[list[int], list[str]]:
        """Wait for their end; exit codes and outputs, by rank."""
        codes = self._read()
        return codes, [Path(f"{self.log}-{rank}").read_text() for rank in range(len(codes))]

    def run(self, folder: Path, processes: int = 2, **request: Any) -> tuple[list[int], list[str]]:
        self.start(folder, processes, **request)
        return self.end()

    def train(self, config: Path, processes: int = 2) -> list[str]:
        codes, outputs = self.run(config.parent, processes, config=str(config))
        assert codes == [0] * processes, outputs
        return outputs

    def _read(self) -> list[int]:
        assert self._server.stdout is not None
        return list(json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


def config_of(folder: Path, model: Path, **options: Any) -> Path:
    steps = {"max_steps": 6, "num_prompts_per_step": 5, "eval_max_prompts": 5}
    return write_config(folder, model, **{"reward_funcs": ["distributed_run:digits"], **steps, **options})


def lines(folder: Path) -> list[dict[str, Any]]:
    return timeless(read_lines(folder))


def weights(folder: Path, file: str = "model/model.safetensors", step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "checkpoints" / f"step-{step:08d}" / file)


def assert_alike(one: Path, several: Path) -> None:
    """The same run but for rounding: every figure, and the weights."""
    mine, theirs = lines(one), lines(several)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if value is None or b[name] is None:
                assert value is b[name], name
            else:
                assert math.isclose(value, b[name], rel_tol=2e-4, abs_tol=2e-5), (a["step"], name, value, b[name])
    file = "model/model.safetensors"
    if not (one / "run" / "checkpoints" / "step-00000006" / file).exists():
        file = "model/adapter_model.safetensors"
    for name, tensor in weights(one, file).items():
        torch.testing.assert_close(weights(several, file)[name], tensor, rtol=1e-4, atol=2e-5)


def assert_same_run(a: Path, b: Path) -> None:
    runs.assert_same_run(a, b, step=6)
    assert not (b / "run" / ".parts").exists()
