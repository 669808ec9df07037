"""The report: complete, safe against what a model may write, readable on any screen, quick to make."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html import unescape as html_unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from fastgrpo.charts import MAX_POINTS
from fastgrpo.completions import write_completions
from fastgrpo.records import Prompt, Rollout
from fastgrpo.report import build_report, reward_curve_svg
from fastgrpo.tracking import MetricsWriter, write_summary

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }}\x00\u202e"
)


def make_run(folder: Path, steps: int = 80, *, evil: bool = False) -> Path:
    """A run directory with plausible numbers: accuracy from 0.43 to about 0.92, two optimizer steps per rollout."""
    rng = np.random.default_rng(0)
    writer = MetricsWriter(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-3 * step / steps)
        reward = float(np.clip(0.43 + 0.52 * progress + rng.normal(0, 0.025), 0, 1))
        rollout = float(rng.normal(0.28, 0.02)) if step % 2 else None
        metrics: dict[str, float | None] = {
            "reward": reward,
            "reward_std": 0.5 - 0.3 * progress,
            "frac_reward_zero_std": 0.1 + 0.55 * progress + float(rng.normal(0, 0.02)),
            "loss": None if step == 20 else float(rng.normal(0, 0.01)),
            "policy_loss": float(rng.normal(0, 0.01)),
            "entropy": 0.62 - 0.4 * progress + float(rng.normal(0, 0.01)),
            "kl": 0.03 * progress + abs(float(rng.normal(0, 0.002))),
            "grad_norm": abs(float(rng.normal(0.6, 0.15))) + (2.5 if step == 33 else 0),
            "lr": 1e-6 * min(step / 10, 1),
            "clip_ratio/low_mean": abs(float(rng.normal(0.01, 0.003))),
            "clip_ratio/high_mean": abs(float(rng.normal(0.015, 0.004))),
            "clip_ratio/region_mean": abs(float(rng.normal(0.025, 0.005))),
            "completions/mean_length": 5.2 - progress + float(rng.normal(0, 0.05)),
            "completions/min_length": 2,
            "completions/max_length": 8,
            "completions/clipped_ratio": 0.05 * (1 - progress),
            "num_tokens": 9000 * step,
            "perf/step_time": (rollout or 0) + 0.19,
            "perf/update_time": 0.17,
            "perf/tokens_per_second": float(rng.normal(12300, 400)),
            "skipped_steps": 0,
        }
        if rollout is not None:
            metrics |= {"perf/rollout_time": rollout, "perf/reward_time": 0.011}
        metrics |= {"rewards/exact_match/mean": reward, "rewards/format/mean": min(1.0, reward + 0.1)}
        metrics |= {"rewards/format/failed": float(step == 7)}
        if step % max(1, steps // 4) == 0 or step == 1:
            metrics |= {"eval/reward": reward - 0.02, "eval/accuracy": reward - 0.03, "eval/pass@4": reward}
        writer.write(step, metrics)
    writer.close()
    write_summary(
        folder / "summary.json", {"accuracy_before": 0.43, "accuracy_after": 0.921, "seconds": 37.2, "steps": steps}
    )
    (folder / "config.yaml").write_text(
        f"model: Qwen/Qwen3-0.6B\nloss_type: dapo\nseed: 42\nmax_steps: {steps}\nlearning_rate: 1.0e-06\n"
    )
    for step in (1, steps // 2, steps):
        write_completions(folder / "completions", step, [sample(i, step, evil) for i in range(64)])
    return folder


def sample(index: int, step: int, evil: bool) -> Rollout:
    a, b = 12 + 7 * (index // 8), 5 + index // 8
    right = index % 8 < 2 + step // 14
    text = EVIL if evil else f"{a} + {b}\n= {a + b if right else a + b + 1 + index % 3} " + "oh " * (index // 8)
    rewards = {"exact_match": float(right), "format": 1.0 if index % 5 else math.nan}
    return Rollout(
        prompt=Prompt(
            index=index,
            content=[{"role": "user", "content": f"What is {a} + {b}?"}] if index % 2 else f"{a}+{b}=",
            token_ids=[1],
        ),
        group=index // 8,
        token_ids=[0] * 6,
        sampling_logprob=torch.zeros(6),
        finished=index % 9 != 0,
        text=text,
        rewards=rewards,
        reward=math.nan if index == 63 else float(right),
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def report(folder: Path) -> tuple[str, Page]:
    path = build_report(folder)
    assert path == folder.resolve() / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


# ------------------------------------------------------------------------------------------------------------ content


def test_figures_curves_and_sections(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path / "arithmetic"))
    text = words(page)
    assert "Qwen/Qwen3-0.6B" in text
    assert "seed 42" in text
    assert "43.0%" in text
    assert "92.1%" in text
    assert "720k" in text  # tokens
    assert "37 s" in text
    for title in (
        "Reward", "Entropy", "KL to the reference", "Completion length", "Loss", "Gradient norm", "Clipped tokens",
        "Groups without a signal", "Learning rate", "Throughput", "Held-out accuracy", "Held-out pass@4",
        "exact_match", "Where the step’s time went", "Sample completions", "Resolved configuration",
    ):  # fmt: skip
        assert title in text, title
    for absent in ("Model FLOPs utilisation", "Peak memory", "Engine against trainer"):
        assert absent not in text
    assert "1 failed sample" in text
    assert "1 not finite" in text  # the null in loss is a gap, and said
    assert "not complete" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    reward = data["chart-reward"]
    assert [line["label"] for line in reward["lines"]] == ["training reward", "held-out reward", "held-out accuracy"]
    first = json.loads((tmp_path / "arithmetic" / "metrics.jsonl").read_text().splitlines()[0])
    assert reward["lines"][0]["values"][0] == pytest.approx(first["reward"], rel=1e-5)
    assert reward["lines"][2]["steps"] == [0, 1, 20, 40, 60, 80]


def test_step_time_shares_add_up_and_missing_stages_count_as_zero(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"perf/step_time": 4.0, "perf/rollout_time": 2.0, "perf/reward_time": 0.5, "perf/update_time": 1.0})
    writer.write(2, {"perf/step_time": 1.0, "perf/update_time": 1.0})
    writer.write(3, {"perf/step_time": 1.0, "perf/update_time": 1.5})  # clocks may disagree: other is never negative
    writer.write(4, {"perf/step_time": None, "perf/update_time": None})
    writer.close()
    _, page = report(tmp_path)
    text = words(page)
    legend = {name: re.search(rf"{name} (\d+) %", text)[1] for name in ("rollout", "update", "reward", "other")}
    assert legend == {"rollout": "31", "update": "54", "reward": "8", "other": "8"}
    assert "step 1: rollout 2 s, update 1 s, reward 0.5 s, other 0.5 s" in text


def test_a_bar_of_the_step_time_covers_whole_rollouts(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in range(1, 401):  # 400 steps, a rollout every 4
        rollout = {"perf/rollout_time": 4.0} if step % 4 == 1 else {}
        writer.write(step, {"perf/step_time": 5.0 if rollout else 1.0, "perf/update_time": 1.0} | rollout)
    writer.close()
    bars = re.findall(
        r"steps (\d+)–(\d+), mean of a step: rollout ([\d.]+) s, update 1 s, other 0 s", report(tmp_path)[0]
    )
    assert [(int(first), int(last)) for first, last, _ in bars] == [(s, s + 7) for s in range(1, 401, 8)]
    assert {seconds for _, _, seconds in bars} == {"1"}


def test_samples_are_the_best_and_the_worst_and_none_twice(tmp_path: Path) -> None:
    rows = []
    for index, value in enumerate([0.5, 0.9, 0.1, math.nan, 0.9, 0.3]):
        row = sample(index, 1, evil=False)
        row.text, row.reward, row.rewards = f"completion-{index}", value, {"only": value}
        rows.append(row)
    rows.append(rows[1])
    write_completions(tmp_path / "completions", 7, rows)
    html, _ = report(tmp_path)
    found = re.findall(r'class="pill (\w+)".*?class="completion">(.*?)</pre>', html, re.S)
    assert found == [
        ("best", "completion-1"), ("best", "completion-4"), ("worst", "completion-2"), ("worst", "completion-5")
    ]  # fmt: skip
    assert "best and worst of 7, 1 without a reward" in re.sub(r"<[^>]*>", "", html)


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>run</b>", 8, evil=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 9, "rewards/</script><i>/mean": 1.0, 'x"><script>alert(1)</script>': 2.0}) + "\n"
        )
    (folder / "config.yaml").write_text("model: <img src=x onerror=alert(1)>\n")
    html, page = report(folder)
    assert [tag for tag, _ in page.tags if tag in ("img", "i", "script")].count("script") == 2
    assert not [
        tag for tag, attributes in page.tags if tag == "img" or any(name.startswith("on") for name in attributes)
    ]
    assert EVIL.replace("\x00", "\u2400") in page.text
    assert "\x00" not in html
    assert "alert(1)" in page.text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path, 8))
    assert not [tag for tag, attributes in page.tags if {"src", "href"} & attributes.keys() or tag in ("link", "base")]
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


# ------------------------------------------------------------------------------------- partial, damaged and huge runs


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    _, page = report(tmp_path)
    assert "No steps have been recorded yet." in page.text
    assert not [tag for tag, _ in page.tags if tag == "figure"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        build_report(tmp_path / "nowhere")


def test_a_partial_and_damaged_run(tmp_path: Path) -> None:
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "step-00000001.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "summary.json").write_text("[1, 2")
    (tmp_path / "config.yaml").write_text("max_steps: 50\nmodel: tiny\n")
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "reward": 0.25, "kl": null, "odd": "text"}\n{"step": 2, "reward": NaN}\n[]\n\x00\xff\n'
        b'{"step": 3, "reward": 1e400, "big": 1' + b"0" * 500 + b'}\n{"step": 4, "rew'
    )
    _, page = report(tmp_path)
    text = words(page)
    assert "This run is not complete: step 3 of 50." in text
    assert "3 lines of metrics.jsonl could not be read" in text
    assert "summary.json could not be read" in text
    assert "step-00000001.parquet could not be read" in text
    assert "KL to the reference" not in text
    (tmp_path / "config.yaml").write_text("a: [")
    assert "config.yaml could not be parsed" in words(report(tmp_path)[1])


def test_a_single_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"reward": 0.0, "loss": -3.5})
    writer.close()
    html, _ = report(tmp_path)
    assert 'd="M1000.0 1000.0h0"' in html
    assert "nan" not in html.lower().replace("finance", "")


def test_a_very_long_run_stays_small_and_keeps_its_extremes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (20, 100_000))
    noise[0, 54_321] = 77.0
    names = ["reward", "loss", "entropy", "kl", "grad_norm", *(f"metric/{i}" for i in range(15))]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(100_000):
            values = dict(zip(names, noise[:, step].tolist(), strict=True))
            file.write(json.dumps({"step": step + 1, **values}) + "\n")
    html, _ = report(tmp_path)
    assert len(html.encode()) < 2_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    line = data["chart-reward"]["lines"][0]
    assert len(line["steps"]) <= MAX_POINTS + 2
    assert line["values"][line["steps"].index(54_322)] == 77.0


def test_it_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    make_run(tmp_path, 4)
    code = (
        "import sys; from fastgrpo.report import build_report; build_report(sys.argv[1]);"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_readme_picture_is_a_standalone_svg(tmp_path: Path) -> None:
    svg = reward_curve_svg(make_run(tmp_path / "a&b<c>", 40))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in svg
    assert "held-out accuracy" in svg
    assert "a&amp;b&lt;c&gt;" in svg
    (tmp_path / "empty").mkdir()
    assert "No reward" in ElementTree.fromstring(reward_curve_svg(tmp_path / "empty")).findtext(".//{*}title")


# --------------------------------------------------------------------------------------------------- in a real browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
PROBE = Path(__file__).with_name("report_probe.html")


def chromium(tmp_path: Path, page: Path, *options: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what it wrote to the console."""
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync disable-background-networking"
    switches += (
        " disable-component-update disable-dev-shm-usage enable-logging=stderr virtual-time-budget=10000 dump-dom"
    )
    command = [str(CHROMIUM), *(f"--{name}" for name in switches.split()), *options]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode(), console


def probe(tmp_path: Path, html: str, widths: list[int], *options: str) -> tuple[list[dict], list[str]]:
    """Measurements of the report, unchanged, in frames of the given widths (a window cannot be made that narrow)."""
    safe = json.dumps(html).replace("<", "\\u003c")
    page = tmp_path / "probe.html"
    page.write_text(PROBE.read_text().replace("WIDTHS", str(widths)).replace("REPORT", safe), encoding="utf-8")
    dom, console = chromium(tmp_path, page, *options)
    body = re.search(r"<body>(.*)</body>", dom, re.S)
    assert body is not None, dom[:2000]
    return json.loads(html_unescape(body[1])), console


@needs_browser
@pytest.mark.browser
def test_it_renders_at_every_width_without_overflow_or_errors(tmp_path: Path) -> None:
    html, _ = report(make_run(tmp_path / ("long-name-" * 12)))
    found, console = probe(tmp_path, html, [320, 360, 768, 1280, 1900])
    assert console == []
    for page in found:
        assert page["overflow"] == 0, page
        assert page["outside"] == [], page
        assert page["charts"] >= 16
        assert page["drawn"] >= page["charts"]
        assert page["hover"].startswith("step 40\ntraining reward 0.")
        assert "held-out accuracy 0." in page["hover"]
        assert page["next"].startswith("step 41\n")
        assert page["hidden"]
    assert [page["width"] for page in found] == [320, 360, 768, 1280, 1900]
    assert {page["background"] for page in found} == {"rgb(247, 247, 245)"}


@needs_browser
@pytest.mark.browser
def test_it_is_dark_where_the_reader_wants_that(tmp_path: Path) -> None:
    html, _ = report(make_run(tmp_path, 8))
    (page,), console = probe(tmp_path, html, [1000], "--blink-settings=preferredColorScheme=0")
    assert (page["background"], page["overflow"], console) == ("rgb(19, 21, 25)", 0, [])


@needs_browser
@pytest.mark.browser
def test_what_a_model_writes_is_not_run(tmp_path: Path) -> None:
    html, _ = report(make_run(tmp_path / "run", 8, evil=True))
    found, console = probe(tmp_path, html, [360, 1280])
    for page in found:
        assert (page["title"], page["images"], page["overflow"]) == ("run · fastgrpo", 0, 0)
    assert console == []
    # Were the escaping to fail one day, the page's policy would still refuse to run what is not its own.
    breached = html.replace("<main>", "<main><script>document.title='owned'</script>")
    (page,), console = probe(tmp_path, breached, [1280])
    assert page["title"] == "run · fastgrpo"
    assert any("Content Security Policy" in line for line in console)


@needs_browser
@pytest.mark.browser
def test_partial_runs_render_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    dom, console = chromium(tmp_path, build_report(tmp_path / "empty"))
    assert "No steps have been recorded yet." in dom
    assert console == []
    writer = MetricsWriter(tmp_path / "one" / "metrics.jsonl")
    writer.write(1, {"reward": 0.5, "perf/step_time": 1.0, "perf/update_time": 1.0})
    writer.close()
    (page,), console = probe(tmp_path, report(tmp_path / "one")[0], [360])
    assert (page["charts"], page["overflow"], console) == (1, 0, [])
    assert page["hover"] == "step 1\ntraining reward 0.5"
