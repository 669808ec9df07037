"""What the GPU suite will find on an H200, before it has run: predictions from bytes and operations, row by row.

    python -m benchmarks.gpu.predictions [--write docs/performance.md]

`attach` puts a prediction beside each row that the model knows; the command prints every figure that is required, and
the tuning plan, as docs/performance.md has them. Nothing here was measured on a GPU but the two figures of
`machine.H200`. The small form's rows get what the same tiny case would take on that GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.gpu import attention, head, passes, predict_head, predict_rollout, predict_update, rollout, update
from benchmarks.gpu.head_cases import SIZES
from benchmarks.gpu.machine import H200, Machine, Prediction, gemm, in_ms
from benchmarks.gpu.update_cases import SHAPES
from fastgrpo_kernels import PackedLayout

Row = dict[str, Any]
_Kind = Callable[[Machine, Row, bool], Prediction | None]
"""(machine, row, small form) -> None where the model does not know the row's peer."""


def _peer(machine: Machine, row: Row, _: bool) -> Prediction | None:
    if row["peer"] == "fastgrpo":
        return predict_head.head(machine, row["params"])
    return predict_head.peer(machine, row["peer"], row["params"]) if row["peer"] in predict_head.PEERS else None


def _against(machine: Machine, row: Row, small: bool) -> Prediction | None:
    p, peer = row["params"], row["peer"]
    if row["op"] == "linear_grpo_loss":
        return predict_head.against_peer(machine, peer, p) if peer in predict_head.PEERS else None
    if row["op"] == "rollout":
        return predict_rollout.against_transformers(machine, p) if peer == "transformers" else None
    return predict_update.against_trl(machine, p, small)


def _step(machine: Machine, row: Row, small: bool) -> Prediction | None:
    made = predict_update.trl if row["peer"] == "trl" else predict_update.ours
    return made(machine, row["params"], small)


def _sharing(machine: Machine, row: Row, small: bool) -> Prediction | None:
    found, _ = predict_update.sharing(machine, row["params"], small)
    return found if row["op"] == "step" else Prediction(found.parts)


def _generate(machine: Machine, row: Row, _: bool) -> Prediction | None:
    engines = {"fastgrpo": "loop", "transformers": "transformers"}
    if row["peer"] not in engines:
        return None
    return predict_rollout.generate(machine, row["params"], engines[row["peer"]])


def _small_op(machine: Machine, row: Row, _: bool) -> Prediction | None:
    return predict_head.small_op(machine, row["op"], row["params"])


def _mfu(machine: Machine, row: Row, small: bool) -> Prediction | None:
    return predict_update.mfu(machine, {**row["params"], "body": row["peer"]}, small)


def _gemm_rate(machine: Machine, row: Row, _: bool) -> Prediction | None:
    n = row["params"]["n"]
    return Prediction({"GEMM": 1e3 * gemm(machine, n, n, n)})


def _alone(machine: Machine, row: Row, small: bool) -> Prediction | None:
    """The very kernels that plain varlen attention calls, and nothing besides."""
    num_q, _, size = attention.heads_of(row["params"]["shape"])
    lengths = attention.alone_lengths(small)
    layout = PackedLayout(lengths, [[]] * len(lengths))
    forward, backward = predict_update.attention(machine, num_q, size, layout)
    return Prediction(in_ms({"forward": forward, "backward": backward}), ratio=1.0)


def _shared(machine: Machine, row: Row, small: bool) -> Prediction | None:
    p = row["params"]
    num_q, _, size = attention.heads_of(p["shape"])
    layout = PackedLayout([p["prompt"]] * p["prompts"], [[p["completion"]] * p["n"]] * p["prompts"])
    forward, backward = predict_update.attention(machine, num_q, size, layout)
    limit = 14 * num_q * size * attention._pairs(layout) / machine.gemm_rate
    return Prediction(in_ms({"forward": forward, "backward": backward}), 1e3 * limit)


def _of(predict: Callable[..., Prediction], **options: Any) -> _Kind:
    return lambda machine, row, small: predict(machine, row["params"], **options)


KINDS: dict[tuple[str, str], _Kind] = {
    ("gemm_rate", "limit"): _gemm_rate,
    ("head_gemms", "limit"): _of(predict_head.head_gemms),
    ("head", "linear_grpo_loss"): _of(predict_head.head),
    ("peers", "linear_grpo_loss"): _peer,
    ("against", "linear_grpo_loss"): _against,
    ("forward", "token_logprob"): _of(predict_head.token_logprob, backward=False),
    ("backward", "token_logprob"): _of(predict_head.token_logprob, backward=True),
    ("single_read", "head"): _of(predict_head.single_read),
    ("tiles", "exp_gemm"): _of(predict_head.tile),
    **{("small_ops", op): _small_op for op in predict_head.SMALL_OPS},
    ("update", "step"): _step,
    ("against", "step"): _against,
    ("dead_groups", "step"): lambda machine, row, small: predict_update.dead_groups(machine, row["params"], small),
    ("sharing", "body"): _sharing,
    ("sharing", "step"): _sharing,
    ("body", "step"): _step,
    ("mfu", "step"): _mfu,
    ("growth", "gradients"): lambda machine, row, small: predict_update.growth(machine, row["params"], small),
    ("checkpointing", "step"): _step,
    ("alone", "attention"): _alone,
    ("shared", "attention"): _shared,
    ("generate", "rollout"): _generate,
    ("against", "rollout"): _against,
    ("steady", "rollout"): lambda machine, row, small: predict_rollout.steady(machine, row["params"], small),
}
"""By a row's case and op."""


def predict(row: Row, small: bool = False, machine: Machine = H200) -> Prediction | None:
    """None for a row that the model says nothing of."""
    kind = KINDS.get((row["case"], row["op"]))
    return kind(machine, row, small) if kind else None


def attach(rows: Sequence[Row], small: bool = False) -> list[Row]:
    """The rows, each that is known with predicted_ms (None where it compares two times), _ratio and _parts (ms)."""
    found = []
    for row in rows:
        made = predict(row, small)
        if made is not None:
            row = {**row, "predicted_ms": made.ms or None, "predicted_ratio": made.compared}
            row["predicted_parts"] = {name: round(ms, 4) for name, ms in made.parts.items()}
            row |= {"predicted_peak_bytes": made.peak_bytes} if made.peak_bytes else {}
        found.append(row)
    return found


@dataclass(frozen=True)
class Figure:
    """A required figure: `at_most` tells a time over a limit from a speed over another's.

    eager: the ratio with layers as transformers has them, where ours are in it.
    """

    name: str
    required: float
    predicted: Prediction
    at_most: bool
    eager: float | None = None

    def reached(self, ratio: float | None) -> bool:
        assert ratio is not None
        return ratio <= self.required if self.at_most else ratio >= self.required


def _figure(name: str, required: float, at_most: bool, case: str, op: str, peer: str, **params: Any) -> Figure:
    made = predict({"case": case, "op": op, "peer": peer, "params": params})
    assert made is not None
    return Figure(name, required, made, at_most)


def _layered(
    name: str, required: float, at_most: bool, predicted: Callable[..., Prediction], p: dict[str, Any]
) -> Figure:
    """A figure that our layers are in, fused and eager."""
    fused, eager = (predicted(H200, p, body=body) for body in ("fused", "eager"))
    return Figure(name, required, fused, at_most, eager.compared)


def figures() -> Iterator[Figure]:
    """Every figure that the suite requires, in the order of its stages."""
    yield from _update_figures()
    yield from _rollout_figures()
    for shape in attention.SHAPES:
        name = f"attention, nothing shared, {shape}: over plain varlen"
        yield _figure(name, attention.ALONE, True, "alone", "attention", "fastgrpo", shape=shape)
    for D, V in SIZES:
        for trainable in (True, False):
            name = f"head, D={D}, V={V}, {'trainable' if trainable else 'frozen'}: over its GEMMs"
            p = {"N": 32768, "D": D, "V": V, "trainable": trainable, "schedule": None}
            found = _figure(name, head.REQUIRED[D, trainable], True, "head", "linear_grpo_loss", "fastgrpo", **p)
            yield found
            peak = Prediction(ratio=(found.predicted.peak_bytes or 0) / 1e9)
            yield Figure(name.replace("over its GEMMs", "peak GB"), head.PEAK_BYTES[trainable] / 1e9, peak, True)
    rows = {"N": 4096, "V": 151936}
    for case, op in (("forward", "token_logprob"), ("backward", "token_logprob"), ("single_read", "head")):
        yield _figure(f"pass: {op}, {case}: over a copy", 1 / passes.MUST_SHARE, True, case, op, "fastgrpo", **rows)
    for D, V in SIZES:
        for peer in predict_head.PEERS:
            p = {"N": 32768, "D": D, "V": V, "trainable": True}
            required = 1.3 if peer == "trl" else 1.0
            yield _figure(f"head, D={D}: {peer}'s time", required, False, "against", "linear_grpo_loss", peer, **p)


def _update_figures() -> Iterator[Figure]:
    small, large = (s.name for s in SHAPES)
    sizes = ((small, "gsm8k", 64), (small, "prompt1024", 16), (large, "gsm8k", 16), (large, "prompt1024", 4))
    for model, lengths, prompts in sizes:
        p, name = {"model": model, "lengths": lengths, "prompts": prompts}, f"update, {model}, {lengths}"
        required = update.FASTER_THAN_TRL[lengths]
        yield _layered(f"{name}: TRL's time", required, False, predict_update.against_trl, p)
        yield _layered(f"{name}: half dead", update.DEAD_FASTER, False, predict_update.dead_groups, p)
        required = update.OF_IDEAL_SHARING * predict_update.sharing(H200, p)[1]
        yield _layered(f"{name}: prompts repeated", required, False, _shared_prompts, p)
    p = {"model": large, "lengths": "gsm8k", "prompts": 64}
    for body in predict_update.LAYERS:  # the best of them must reach it
        yield _figure(f"MFU, {large}, {body}", update.MFU, False, "mfu", "step", body, **p)
    growth = {"model": small, "budget": 8192}
    yield _figure("time per token, 8k to 128k", update.FLAT, True, "growth", "gradients", "itself", **growth)


def _rollout_figures() -> Iterator[Figure]:
    job = rollout.JOBS[False].params
    for s, required in zip(SHAPES, rollout.FASTER_THAN_TRANSFORMERS, strict=True):
        name, p = f"rollout, {s.name}: continuous batching's time", {"model": s.name, **job}
        yield Figure(name, required, predict_rollout.against_transformers(H200, p), False)
        for rows, length in ((512, 384), (1024, 640)):
            p = {"model": s.name, "rows": rows, "length": length}
            name = f"decoding, {s.name}, {rows} rows: over the limit"
            yield Figure(name, rollout.OF_LIMIT, predict_rollout.steady(H200, p), True)


def _shared_prompts(machine: Machine, p: dict[str, Any], body: str) -> Prediction:
    return predict_update.sharing(machine, p, body=body)[0]


def _cells(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def required_table() -> str:
    """Markdown: each figure with what is predicted."""
    rows = [["figure", "required", "predicted", "eager layers", "ms", "most of it"]]
    for f in figures():
        sign, made = "<=" if f.at_most else ">=", f.predicted
        shown = ["" if x is None else f"{x:.3g}{'' if f.reached(x) else ' **no**'}" for x in (made.compared, f.eager)]
        spent = ["", ""]
        if made.parts:
            spent = [f"{made.ms:.4g}", f"{made.largest}, {made.parts[made.largest] / made.ms:.0%}"]
        rows.append([f.name, f"{sign} {f.required:.3g}", *shown, *spent])
    return _cells(rows)


def blocks() -> dict[str, str]:
    """What the page has between its markers."""
    from benchmarks.config_space import space_rows
    from benchmarks.gpu.tuning_plan import plan_rows

    return {"required": required_table(), "plan": _cells(plan_rows()), "space": _cells(space_rows())}


def written(page: str) -> str:
    """The page with its generated tables renewed. ValueError for a page without their markers."""
    for name, text in blocks().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"no markers of {name} in the page: {begin.strip()} ... {end}")
        page = before + begin + text + end + after
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.predictions", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="renew the tables between the page's markers")
    args = parser.parse_args(argv)
    if args.write:
        args.write.write_text(written(args.write.read_text()))
    else:
        print("\n".join(blocks().values()))
    return 0


if __name__ == "__main__":
    command.end(main)
