"""The host's cost of decoding: the stand-in gives tokens, the engine's own code does the rest, by phase."""

from __future__ import annotations

import pytest

from benchmarks import rollout_host


def test_seconds_by_phase_of_real_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_host, "_VOCABULARY", 2000)
    monkeypatch.setattr(rollout_host, "_MEAN", 20)
    tokenizer = rollout_host.make_tokenizer()
    assert len(tokenizer) == 2000
    (start, *bursts), made = rollout_host.measure(tokenizer, 2)
    assert [r.text for r in made] == tokenizer.batch_decode([r.token_ids for r in made], skip_special_tokens=True)
    assert all(r.finished and r.token_ids[-1] == 1999 for r in made)
    assert {"start", "critical"} <= start.keys()
    assert bursts[0]["alive"] == len(made) == 32
    assert [b["alive"] for b in bursts] == sorted((b["alive"] for b in bursts), reverse=True)
    assert all(b["critical"] > 0 and b["deferred"] > 0 for b in bursts)
    assert sum("texts" in b for b in bursts[1:]) > 5
    assert "texts" not in bursts[0]  # nothing has ended before it
