"""The math reward on real GSM8K lines, and against expressions that hang sympy."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fastgrpo.rewards import RewardFunction, RewardRunner, resolve
from fastgrpo.rewards import math_equivalence as module
from fastgrpo.rewards.math_equivalence import math_equivalence
from fastgrpo.rewards.math_worker import after_hashes, last_boxed, score

DATA = Path(__file__).parents[1] / "data"
HANGS = r"it is \boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def reward():
    math = math_equivalence(sample_timeout=30.0, num_workers=2)
    yield math
    math.close()


@pytest.fixture(scope="module")
def gsm8k():
    lines = [line for name in ("train", "test") for line in (DATA / f"gsm8k_{name}.jsonl").read_text().splitlines()]
    return [json.loads(line)["answer"] for line in lines]


def finals(gsm8k):
    return [answer.rpartition("####")[2].strip() for answer in gsm8k]


def test_gsm8k_worked_answers_score_1(reward, gsm8k):
    assert len(gsm8k) == 64
    assert reward(gsm8k, gsm8k) == [1.0] * 64


def test_gsm8k_other_forms_of_the_right_answer(reward, gsm8k):
    boxed = [rf"Let us see: 3 + 4 = 7. So \boxed{{{final}}}." for final in finals(gsm8k)]
    prose = [f"In the end there are {final}." for final in finals(gsm8k)]
    assert reward(boxed, gsm8k) == [1.0] * 64
    assert reward(prose, gsm8k) == [1.0] * 64
    assert reward(boxed, [float(final.replace(",", "")) for final in finals(gsm8k)]) == [1.0] * 64
    assert reward(boxed, solution=gsm8k) == [1.0] * 64


def test_gsm8k_wrong_answers_score_0(reward, gsm8k):
    wrong = [f"#### {float(final.replace(',', '')) + 1:g}" for final in finals(gsm8k)]
    assert reward(wrong, gsm8k) == [0.0] * 64


@pytest.mark.parametrize(
    ("gold", "completion", "verdict"),
    [
        ("#### 1,000", r"\boxed{1000}", 1.0),
        ("#### 1,000", r"\boxed{1{,}000}", 1.0),
        ("1000", "#### $1,000", 1.0),
        ("#### 1,000", "#### 1", 0.0),
        ("$18", r"\boxed{\$18.00}", 1.0),
        ("#### -5", "#### -$5", 1.0),
        ("-5", r"\boxed{5}", 0.0),
        ("72", "#### 72 clips\n\nQuestion: 3", 1.0),
        ("72", "#### **72**.", 1.0),
        ("72", r"first \boxed{71}, no: \boxed{72}", 1.0),
        ("72", r"first \boxed{72}, no: \boxed{71}", 0.0),
        ("72", r"#### 71 \boxed{72}", 1.0),
        ("72", r"\boxed{72} and then \boxed{7", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"\frac12", r"\boxed{\dfrac{2}{4}}", 1.0),
        ("1/2", r"$\boxed{\frac{1}{2}}$", 1.0),
        (r"We get $x = \boxed{\frac{\sqrt{3}}{2}}$.", r"\boxed{\sqrt{3}/2}", 1.0),
        ("$x^2+1$", r"\boxed{1+x^2}", 1.0),
        ("x^2+1", r"\boxed{x^2-1}", 0.0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
        (r"2\sqrt{3}", r"\boxed{2}", 0.0),
        ("The answer is 12", "so 12", 1.0),
        (72, "72", 1.0),
        (3.5, "7/2", 1.0),
        ("72", "", 0.0),
        ("72", "no idea at all", 0.0),
        ("72", r"\boxed{}", 0.0),
        ("72", r"\boxed{\frac{}", 0.0),
        ("72", "####", 0.0),
        ("72", rf"\boxed{{{'9' * 6000}}}", 0.0),
        ("72", "9" * 6000, 0.0),
    ],
)
def test_forms(gold, completion, verdict):
    assert score(str(gold), completion) == (verdict, "")


@pytest.mark.parametrize("gold", ["", "  ", "####", "no idea whatsoever", r"\frac{1}{", ".."])
def test_an_unreadable_gold_fails_the_sample(gold):
    assert score(gold, "72") == (None, "the gold answer cannot be parsed")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{\frac{1}{2}} {", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"} \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{4}", "4"),
        (r"\boxed{1", None),
        (r"{\boxed{1}", "1"),
        ("nothing", None),
        (r"\boxed{" * 50_000, None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_after_hashes():
    assert after_hashes("a #### 1\n#### 2 \nmore") == "2 "
    assert after_hashes("a") is None


def test_chat_and_missing_golds(reward):
    completions = [[{"role": "assistant", "content": r"\boxed{1}"}]] * 3
    assert reward(completions, [1, None, None], [None, "2", None]) == [1.0, 0.0, None]
    with pytest.raises(ValueError, match="'answer' or 'solution'"):
        reward(completions)


def test_a_sample_that_hangs_fails_alone_and_the_pool_lives_on(caplog):
    math = math_equivalence(sample_timeout=1.0, num_workers=2)
    try:
        assert math(["72", HANGS, "#### 71", HANGS, r"\boxed{72}"], ["72", "1", "72", "1", 72]) == [1, None, 0, None, 1]
        assert caplog.text.count("no verdict after 1 s") == 1
        worker = math._finalizer.peek()[2][0].pid
        assert math(["72"], [72]) == [1.0]
        assert math._finalizer.peek()[2][0].pid == worker
    finally:
        math.close()


def test_when_the_call_runs_out_of_time_what_is_done_counts(caplog):
    math = math_equivalence(sample_timeout=3600, call_timeout=1.0, num_workers=2)
    try:
        assert math(["72", "71", *[HANGS] * 20], [72] * 22) == [1.0, 0.0, *[None] * 20]
        assert "the time for the whole call ran out" in caplog.text
        assert math(["72"], [72]) == [1.0]
    finally:
        math.close()


def test_a_dead_process_fails_one_call(reward):
    assert reward(["1"], [1]) == [1.0]
    os.killpg(reward._finalizer.peek()[2][0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="died"):
        reward(["1"], [1])
    assert reward(["1"], [1]) == [1.0]


def alive_in_group(group):
    """Processes of the group that are no zombies (an orphan's zombie is init's to reap)."""
    fields = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields.append(path.read_text().rpartition(")")[2].split())
    return [f for f in fields if f[2] == str(group) and f[0] != "Z"]


def wait_until_empty(group):
    deadline = time.monotonic() + 60
    while alive_in_group(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive_in_group(group)


def test_close_ends_every_process_hung_or_not():
    math = math_equivalence(num_workers=2)
    assert math(["1"], [1]) == [1.0]
    process = math._finalizer.peek()[2][0]
    math._connection.send(([("1", HANGS)] * 2, 3600.0, 3600.0))
    assert len(alive_in_group(process.pid)) == 3
    math.close()
    assert process.poll() is not None
    assert wait_until_empty(process.pid)
    assert math(["1"], [1]) == [1.0]
    math.close()


def test_the_processes_end_when_the_trainer_is_killed():
    script = textwrap.dedent(
        """
        import os, signal
        from fastgrpo.rewards.math_equivalence import math_equivalence
        math = math_equivalence(num_workers=1)
        math(["72"], [72])
        print(math._finalizer.peek()[2][0].pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert wait_until_empty(int(done.stdout))


def test_through_the_runner_in_a_thread(reward, gsm8k):
    import torch

    from fastgrpo.records import Prompt, Rollout

    prompts = [Prompt(i, "q", [1], {"answer": answer}) for i, answer in enumerate(gsm8k[:4])]
    rollouts = [Rollout(p, i, [1], torch.zeros(1), True, p.columns["answer"]) for i, p in enumerate(prompts)]
    rollouts[3].text = "#### -1"
    report = RewardRunner([RewardFunction("math", reward, timeout=60)]).score(rollouts)
    assert [r.reward for r in rollouts] == [1.0, 1.0, 1.0, 0.0]
    assert report.metrics["rewards/math/failed"] == 0


def test_a_script_without_a_main_guard_runs_once_and_ends_while_a_sample_hangs(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import threading
            from fastgrpo.rewards.math_equivalence import math_equivalence
            print("runs")
            math = math_equivalence(num_workers=1, sample_timeout=3600)
            print(math(["72"], [72]))
            threading.Thread(target=math, args=([{HANGS!r}], [1]), daemon=True).start()
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "runs\n[1.0]\n"


def test_without_the_extra_construction_says_what_to_install(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name in ("math_verify", "pebble") else find_spec(name)
    )
    with pytest.raises(ImportError, match=r"needs math_verify and pebble: pip install fastgrpo\[math\]"):
        resolve("math")


@pytest.mark.parametrize("options", [{"sample_timeout": 0}, {"call_timeout": -1}, {"num_workers": 0}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        math_equivalence(**options)


def test_the_worker_imports_nothing_heavy():
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1], run_name='worker'); import math_verify, pebble;"
        "assert not {'torch', 'transformers', 'fastgrpo', 'numpy'} & set(sys.modules)"
    )
    script = Path(module.__file__).with_name("math_worker.py")
    subprocess.run([sys.executable, "-P", "-c", code, str(script)], check=True, timeout=120)
