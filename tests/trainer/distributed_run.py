"""Runs of several processes on one CPU, for test_distributed.py.

`python distributed_run.py` reads requests from its standard input, a line of JSON each, forks that many processes with
the environment torchrun would give them, and answers with their ids and, when all have ended, their exit codes. The
fork saves the imports, nothing else. Of a request: `config` is trained on, or `probe`, a function of this file, is
called; `moment`, `at` and `rank` say where which process kills itself (killed_run.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import killed_run
import pytest
import torch
import yaml


def digits(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
    """The share of digits, which depends on nothing but the completion."""
    log_metric("length", sum(map(len, completions)) / len(completions))
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def digits_or_nothing(completions: list[str], log_metric: Any, **_: Any) -> list[float | None]:
    """Fails on every sample of the second process, whichever that is."""
    if os.environ["RANK"] == "1":
        raise ValueError("only here")
    return list(digits(completions, log_metric))


def nothing(completions: list[str], **_: Any) -> list[None]:
    """No reward at all after the first two batches."""
    global calls
    calls += 1
    return [None if calls > 2 else float(i % 2) for i, _ in enumerate(completions)]  # type: ignore[misc]


calls = 0


def rows_by_rank() -> Any:
    """A data set that is another one in each process."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"{i}=", "answer": "1"} for i in range(3 + int(os.environ["RANK"]))])


def rows_in_another_order() -> Any:
    """As many rows in each process, and others come first."""
    from datasets import Dataset

    order = reversed(range(9)) if os.environ["RANK"] == "1" else range(9)
    return Dataset.from_list([{"prompt": f"{i}=", "answer": "1"} for i in order])


class Early:
    """A callback that in the second process alone asks for an end after step 3."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3 and not state.is_world_process_zero:
            control.should_training_stop = True


def probe_values(folder: Path) -> None:
    """What `Ranks` does with values on the host."""
    from fastgrpo.distributed import Ranks
    from fastgrpo.errors import OtherProcessFailed, RunError
    from fastgrpo.signals import StopRequested

    ranks = Ranks.join()
    assert (ranks.size, ranks.alone, ranks.first) == (3, False, ranks.rank == 0)
    assert ranks.gather("numbers", ranks.rank * 10) == [0, 10, 20]
    parts = ranks.gather("parts", ranks.share(list("abcdefgh")))
    assert parts == [(0, ["a", "b"]), (2, ["c", "d", "e"]), (5, ["f", "g", "h"])]
    assert ranks.share(["one"]) == ((0, ["one"]) if ranks.rank == 2 else (0, []))
    assert ranks.together("stage", lambda: ranks.rank + 1) == [1, 2, 3]
    assert ranks.from_first("only there", lambda: 7 if ranks.first else 1 / 0) == 7

    def fails() -> None:
        if ranks.rank == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError if ranks.rank == 1 else OtherProcessFailed, match="mine") as caught:
        ranks.together("fails", fails)
    assert ranks.known is caught.value
    assert ranks.rank == 1 or "process 1 failed: KeyError" in str(caught.value)

    def stops() -> None:
        if ranks.rank == 2:
            raise StopRequested(signal.SIGTERM)

    with pytest.raises(StopRequested, match="SIGTERM"):
        ranks.together("stops", stops)
    ranks.same("sizes", lambda: ranks.size)
    with pytest.raises(RunError, match="different numbers: 0, 1, 2") as unlike:
        ranks.same("numbers", lambda: ranks.rank)
    assert ranks.known is unlike.value  # so that a run saves what it has
    # What cannot be pickled is a failure like any other, and nobody waits for it.
    with pytest.raises((pickle.PicklingError, AttributeError) if ranks.first else OtherProcessFailed):
        ranks.together("pickles", lambda: (lambda: None) if ranks.first else None)
    with pytest.raises(OtherProcessFailed, match="come apart"):
        ranks.gather("here" if ranks.first else "there", None)
    (folder / f"passed-{ranks.rank}").touch()
    ranks.leave()


def probe_tensors(folder: Path) -> None:
    """What it does with tensors: any shapes, dtypes and strides, large ones and small ones."""
    from fastgrpo import distributed

    distributed._BUCKET = 50
    ranks = distributed.Ranks.join()

    def make(rank: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(rank)
        shapes = [(3,), (4, 5), (60,), (), (7, 2), (2, 3, 2), (0,)]
        made = [torch.randn(shape, generator=generator) for shape in shapes]
        made[4] = made[4].t()
        return [*made, made[1].double(), torch.tensor([rank, 2]), torch.randn(9, 8, generator=generator)[:, 1:3]]

    everybody = [make(rank) for rank in range(ranks.size)]
    own = make(ranks.rank)
    ranks.add_up(own)
    for tensor, parts in zip(own, zip(*everybody, strict=True), strict=True):
        torch.testing.assert_close(tensor, sum(parts[1:], start=parts[0].clone()))
    sums = ranks.gather("sums", own)
    assert all(torch.equal(a, b) for other in sums for a, b in zip(other, own, strict=True))
    owners = [i % 3 for i in range(len(own))]
    parts = make(ranks.rank)
    ranks.add_up_at(owners, parts)
    owned = [rank == ranks.rank for rank in owners]
    for mine, part, whole in zip(owned, parts, own, strict=True):
        assert not mine or torch.allclose(part, whole)
    own = make(ranks.rank)
    ranks.copy_from(owners, own)
    for owner, tensor, *given in zip(owners, own, *everybody, strict=True):
        assert torch.equal(tensor, given[owner])
    own = make(ranks.rank)
    ranks.copy_from_first(own)
    assert all(torch.equal(a, b) for a, b in zip(own, everybody[0], strict=True))
    (folder / f"passed-{ranks.rank}").touch()
    ranks.leave()


def probe_end(folder: Path) -> None:
    """`leave` waits for all; and who waits for a process that is gone hears of it."""
    from fastgrpo.distributed import Ranks
    from fastgrpo.errors import OtherProcessFailed

    ranks = Ranks.join()
    if ranks.first:
        time.sleep(0.3)
        (folder / "the last one's last act").touch()
    ranks.leave()
    assert (folder / "the last one's last act").exists()
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    ranks = Ranks.join()
    if ranks.rank == 2:
        os._exit(0)
    with pytest.raises(OtherProcessFailed, match="another process has ended; this one waited for it at 'numbers'"):
        ranks.gather("numbers", 1)
    ranks.leave()  # it has ended, so there is nobody to wait for


def probe_gpus(folder: Path) -> None:
    """Which GPU each takes; fakes stand in for CUDA and NCCL."""
    import torch.distributed as dist

    from fastgrpo.distributed import Ranks
    from fastgrpo.errors import RunError

    make, taken = dist.new_group, []
    dist.new_group = lambda backend, timeout: make(backend="gloo", timeout=timeout)
    dist.init_process_group("gloo")  # as a script may have done
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = taken.append  # type: ignore[assignment]
    torch.cuda.current_device = lambda: taken[-1]
    rank = dist.get_rank()
    assert Ranks.join(cpu=True).size == 3
    assert taken == []

    def see(*names: str) -> None:
        torch.cuda.device_count = lambda: len(names)
        torch.cuda.get_device_properties = lambda i: SimpleNamespace(uuid=names[i])  # type: ignore[assignment]

    see("a", "b", "c", "d")
    os.environ |= {"WORLD_SIZE": "", "LOCAL_RANK": ""}
    for _ in range(2):  # where no launcher says so, too
        assert Ranks.join().rank == rank
        os.environ.pop("RANK", None)
    assert taken == [rank, rank]
    see("abc"[rank])  # each sees its own alone
    assert Ranks.join().size == 3
    assert taken[-1] == 0
    see("a", "b")
    with pytest.raises(RunError, match="3 processes for 2 GPUs: each needs one of its own"):
        Ranks.join()
    if rank == 1:
        socket.gethostname = lambda: "elsewhere"
    os.environ.pop("LOCAL_WORLD_SIZE")
    with pytest.raises(RunError, match="3 processes on several machines"):
        Ranks.join()


def _trainer(folder: Path, callbacks: Any = None, **changed: Any) -> Any:
    from fastgrpo import GRPOConfig, GRPOTrainer

    options = yaml.safe_load((folder / "config.yaml").read_text()) | changed
    names = ("model", "train_dataset", "eval_dataset", "reward_funcs")
    task = {name: options.pop(name) for name in names}
    return GRPOTrainer(args=GRPOConfig(**options), callbacks=callbacks, **task)


def probe_callback(folder: Path) -> None:
    """A run from Python, with a callback."""
    trainer = _trainer(folder, [Early])
    assert trainer.train().step == 3
    trainer.ranks.leave()


def probe_script(folder: Path) -> None:
    """What scripts do: callbacks for the first process alone, names of its own in each, an evaluation after a stop."""
    from fastgrpo.config import ConfigError
    from fastgrpo.signals import StopRequested

    rank = int(os.environ["RANK"])
    with pytest.raises(ConfigError, match=r"different values of output_dir: .*/run-0, .*/run-1"):
        _trainer(folder, output_dir=str(folder / f"run-{rank}")).train()
    assert not (folder / f"run-{rank}").exists()
    with pytest.raises(ConfigError, match="different values of eval_steps: 3, 4"):
        _trainer(folder, eval_steps=3 + rank).train()
    trainer = _trainer(folder, [Stopped] if rank == 0 else [], run_name=f"run-{rank}")
    with pytest.raises(StopRequested):
        trainer.train()
    assert 0 <= trainer.evaluate()["eval/reward"] <= 1
    trainer.ranks.leave()


class Stopped:
    """A callback whose process is asked to stop."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def probe_asked_later(folder: Path) -> None:
    """The second process is asked to stop when the first one's request has it saving already."""
    from fastgrpo import trainer as module
    from fastgrpo.signals import StopRequested

    trainer = _trainer(folder, [Stopped] if os.environ["RANK"] == "0" else [], save_steps=0)
    if os.environ["RANK"] == "1":
        write = module.write_part

        def asked(*args: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return write(*args, **options)

        module.write_part = asked
    with pytest.raises(StopRequested):
        trainer.train()
    trainer.ranks.leave()


def probe_eval(folder: Path) -> None:
    """The command `eval`."""
    from fastgrpo.cli import main

    assert main(["eval", str(folder / "config.yaml")]) == 0


def _note_weights(folder: Path) -> None:
    """Each process leaves a digest of its weights at the end of the run."""
    from fastgrpo.trainer import GRPOTrainer

    end = GRPOTrainer._end

    def noted(self: GRPOTrainer) -> None:
        digest = hashlib.sha256()
        for parameter in self.policy.model.parameters():
            digest.update(parameter.detach().float().numpy().tobytes())
        (folder / f"weights-{self.ranks.rank}").write_text(digest.hexdigest())
        end(self)

    GRPOTrainer._end = noted  # type: ignore[method-assign]


def _serve_by_loop(rank: int) -> None:
    """Servers' samples drawn by the loop engine, of the first process alone."""
    from fastgrpo.rollout import engine

    def make(config: Any, policy: Any) -> Any:
        assert rank == 0
        return engine._loop(config, policy)

    engine._MAKERS["vllm_server"] = make


def _disturb(what: str) -> None:
    """Faults of the second process alone."""
    from fastgrpo import packing
    from fastgrpo.policy import Policy
    from fastgrpo.rollout.loop import LoopEngine
    from fastgrpo.trainer import GRPOTrainer

    if what == "drift":
        begin = GRPOTrainer._begin

        def moved(self: GRPOTrainer) -> None:
            begin(self)
            with torch.no_grad():
                for parameter in self.policy.model.parameters():
                    parameter += 1e-3

        GRPOTrainer._begin = moved  # type: ignore[method-assign]
    elif what == "sharing":
        check = Policy.self_check

        def refuse(self: Policy, **options: Any) -> None:
            check(self, **options)
            self.unshared = "this machine says so"

        Policy.self_check = refuse  # type: ignore[method-assign, assignment]
    elif what == "selection":
        select = packing.select
        packing.select = lambda rollouts, **options: select(rollouts, **options)[1:]
    elif what == "engine":
        LoopEngine.generate = lambda *_, **__: 1 / 0  # type: ignore[method-assign, assignment]


def work(request: dict[str, Any], rank: int) -> int:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request["processes"]),
        "LOCAL_WORLD_SIZE": str(request["processes"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(request["port"]),
    }
    folder = Path(request["log"]).parent
    if "probe" in request:
        globals()[request["probe"]](folder)
        return 0
    _note_weights(folder)
    affected = rank == request.get("rank", 1)
    if request.get("server"):
        _serve_by_loop(rank)
    if affected and "fault" in request:
        _disturb(request["fault"])
    return killed_run.run(
        request.get("moment", "never") if affected else "never", request.get("at", 0), request["config"]
    )


def serve() -> None:
    import datasets  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in range(request["processes"]):
            pid = os.fork()
            if pid == 0:
                output = os.open(f"{request['log']}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = 1
                try:
                    code = work(request, rank)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            children.append(pid)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


if __name__ == "__main__":
    sys.modules["distributed_run"] = sys.modules["__main__"]
    serve()
