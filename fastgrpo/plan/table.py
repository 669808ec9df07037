"""The table of what fits: model size by context, for GRPO, GRPO with LoRA, and PPO."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

from fastgrpo.config import GRPOConfig
from fastgrpo.gpus import Device
from fastgrpo.plan.planner import plan_run
from fastgrpo.plan.records import Workload
from fastgrpo.plan.shapes import describe_shape
from fastgrpo.policy.loading import skeleton_of

BEGIN, END = "<!-- plan:table -->", "<!-- plan:end -->"
"""What stands before and behind the table in a file that holds it."""

CARDS = (24, 48, 80, 141)
"""GB of GPUs that there are."""

CONTEXTS = (2048, 8192, 32768)
"""Tokens of a prompt and its completion together; a quarter is the prompt."""

_METHODS: dict[str, dict[str, bool]] = {"GRPO": {}, "LoRA": {"lora": True}, "PPO": {"critic": True}}
_GROUP = 8


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
}
"""Configs of Qwen3's models, as far as sizes go."""


def make_table() -> str:
    """The table in Markdown: the smallest card that holds the run, and the GB that it needs."""
    heads = [f"{method}, {context // 1024}k" for context in CONTEXTS for method in _METHODS]
    lines = [_row(["", *heads]), _row(["---"] + ["---:"] * len(heads))]
    for name, sizes in MODELS.items():
        model = skeleton_of(sizes)
        cells = [_cell(model, context, **method) for context in CONTEXTS for method in _METHODS.values()]
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(model: Any, context: int, *, lora: bool = False, critic: bool = False) -> str:
    config = GRPOConfig(
        gradient_checkpointing=True,
        max_tokens_per_microbatch=max(context, 8192),
        num_generations=_GROUP,
        rollout_batch_size=_GROUP,
        rollout_engine="loop",
        use_peft=lora,
    )
    shape = describe_shape(model, config)
    workload = Workload(config.num_prompts_per_step, _GROUP, context // 4, context - context // 4, context / 2)

    def serves(gigabytes: int) -> bool:
        card = Device("a GPU", gigabytes * 10**9, capability=8)
        plan = plan_run(shape, config, card, workload, critic=critic)
        return plan.fits and plan.inputs["rollout_rows"] == _GROUP

    least = bisect_left(range(1 << 12), True, key=serves)
    card = next((card for card in CARDS if card >= least), None)
    return f"- ({least})" if card is None else f"**{card}** ({least})"


def write_table(path: Path) -> None:
    """Put the table between its marks in a file. Raises ValueError for a file without them."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END} for the table to stand between")
    path.write_text(f"{before}{BEGIN}\n{make_table()}\n{END}{after}", encoding="utf-8")
