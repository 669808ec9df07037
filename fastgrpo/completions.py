"""The table of completions: a Parquet file per rollout batch, for people and for the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.files import replacing
from fastgrpo.records import Rollout
from fastgrpo.tracking import plain


def write_completions(folder: str | Path, step: int, rollouts: Sequence[Rollout]) -> Path:
    """Writes the rollouts to `folder/step-00000123.parquet`, atomically, and returns that path.

    Columns: step, group (int64), prompt (a string, or chat messages as JSON), completion (string), reward,
    rewards/<function> (float64, null = failed), advantage (float64), num_tokens (int64), finished (bool); and what the
    reward functions gave to `log_extra`, as strings.
    """
    import pyarrow
    import pyarrow.parquet

    functions = list(dict.fromkeys(name for rollout in rollouts for name in rollout.rewards))
    columns: dict[str, tuple[Any, list[Any]]] = {
        "step": (pyarrow.int64(), [step] * len(rollouts)),
        "group": (pyarrow.int64(), [rollout.group for rollout in rollouts]),
        "prompt": (pyarrow.string(), [_text(rollout.prompt.content) for rollout in rollouts]),
        "completion": (pyarrow.string(), [_text(rollout.text) for rollout in rollouts]),
        "reward": (pyarrow.float64(), [plain(rollout.reward) for rollout in rollouts]),
    }
    for name in functions:
        columns[f"rewards/{name}"] = (pyarrow.float64(), [plain(rollout.rewards.get(name)) for rollout in rollouts])
    columns |= {
        "advantage": (pyarrow.float64(), [plain(_advantage(rollout)) for rollout in rollouts]),
        "num_tokens": (pyarrow.int64(), [rollout.num_tokens for rollout in rollouts]),
        "finished": (pyarrow.bool_(), [rollout.finished for rollout in rollouts]),
    }
    for name in dict.fromkeys(name for rollout in rollouts for name in rollout.extra):
        values = [_text(rollout.extra.get(name)) for rollout in rollouts]
        columns.setdefault(name, (pyarrow.string(), values))  # the columns above keep their names
    table = pyarrow.table({name: pyarrow.array(values, type=kind) for name, (kind, values) in columns.items()})
    path = Path(folder) / f"step-{step:08d}.parquet"
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    return path


def _advantage(rollout: Rollout) -> float:
    """Of its tokens the mean, where each has its own."""
    return rollout.advantage if rollout.advantages is None else rollout.advantages.mean().item()


def _text(content: Any) -> str:
    """Text that UTF-8 can hold: a tokenizer may decode a sampled half of a surrogate pair."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")
