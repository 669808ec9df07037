"""The process that checks mathematical answers, which `math_equivalence.py` runs as a script.

It imports math-verify once and then forks workers, so that killing one that hangs costs milliseconds. Forking happens
here and not in the trainer, which has threads and a GPU; and `multiprocessing`'s spawn would run the user's training
script again in every worker. It imports nothing of fastgrpo.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

Outcome = tuple[float | None, str]
"""(score, "") or (None, why there is none)."""

MEMORY_LIMIT = 4 << 30
"""Bytes of address space per worker: a tower of powers must not bring the machine down."""

MAX_DIGITS = 4000
"""Of a number: Python itself refuses to read much longer ones."""

OUT_OF_TIME = "the time for the whole call ran out"

_BRACE = re.compile(r"(?P<boxed>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_NUMBER = re.compile(r"([-+]?)[\\$€£¥\s]*([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)[\\$\s]*")
_UNIT = re.compile(r"\s+[A-Za-z]{2,}[A-Za-z .]*$")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, braces balanced; None if there is none."""
    opened: list[tuple[bool, int]] = []
    found: tuple[int, int] | None = None
    for token in _BRACE.finditer(text):
        if token["boxed"] or token["open"]:
            opened.append((token["boxed"] is not None, token.end()))
        elif token["close"] and opened:
            boxed, start = opened.pop()
            if boxed and (found is None or start > found[0]):
                found = (start, token.start())
    return None if found is None else text[found[0] : found[1]]


def after_hashes(text: str) -> str | None:
    """The first line after the last "####" (GSM8K's form); None without one."""
    _, hashes, tail = text.rpartition("####")
    return tail.strip().partition("\n")[0] if hashes else None


def parse_number(text: str) -> list[Any]:
    """[the sympy number] if the text is nothing but one: sign, currency, thousands separators; else []."""
    from sympy import Number

    match = _NUMBER.fullmatch(text.strip(" \n*").rstrip(" .*").replace("−", "-").replace("{,}", ","))
    if match is None or (match[1] and match[2]) or len(match[3]) > MAX_DIGITS:
        return []
    return [Number(match[1] + match[2] + match[3].replace(",", ""))]


def parse_latex(text: str) -> list[Any]:
    r"""What stands inside `\boxed{}`: a number or bare LaTeX. [] if it cannot be parsed."""
    from math_verify import parse

    return parse_number(text) or parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def parse_plain(text: str) -> list[Any]:
    """An answer outside a box: a number, one with a unit, bare LaTeX, or a sentence that holds the answer."""
    from math_verify import parse

    number = parse_number(_UNIT.sub("", text))
    if number:
        return number
    if any(mark in text for mark in ("$", "\\(", "\\[")) or _PROSE.search(text):
        return parse(text, parsing_timeout=None)
    return parse_latex(text)


def parse_marked(text: str) -> list[Any] | None:
    r"""The answer marked by the last `\boxed{}`, failing that by "####"; None if nothing is marked."""
    boxed = last_boxed(text)
    if boxed is not None:
        return parse_latex(boxed)
    line = after_hashes(text)
    return None if line is None else parse_plain(line)


def score(gold: str, completion: str) -> Outcome:
    """1.0 where the completion's answer equals the gold one, else 0.0; None where the gold is unreadable."""
    from math_verify import parse, verify

    golds = parse_marked(gold)
    if golds is None:
        golds = parse_plain(gold)
    if all(isinstance(gold, str) for gold in golds):  # math-verify falls back to the bare string
        return None, "the gold answer cannot be parsed"
    answers = parse_marked(completion)
    if answers is None:
        answers = parse(completion, parsing_timeout=None)
    return float(verify(golds, answers, timeout_seconds=None)), ""


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


def _result(future: Any, sample_timeout: float, deadline: float) -> Outcome:
    try:
        return future.result(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return None, f"no verdict after {sample_timeout:g} s" if future.done() else OUT_OF_TIME
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def serve(connection: Connection, num_workers: int) -> None:
    """Answer `(pairs, sample_timeout, call_timeout)`, in seconds, until the other end closes.

    pairs is a list of `(gold, completion)`; the answer is a list of as many `Outcome`.
    """
    import math_verify  # noqa: F401  (before the fork, so that workers have it)
    from pebble import ProcessPool

    # Its warnings that time-outs are off would come once per worker; the pool is the time-out.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    fork = multiprocessing.get_context("fork")
    pool = ProcessPool(num_workers, initializer=_prepare_worker, context=fork)
    while True:
        try:
            pairs, sample_timeout, call_timeout = connection.recv()
            deadline = time.monotonic() + call_timeout
            futures = [pool.schedule(score, args=pair, timeout=sample_timeout) for pair in pairs]
            outcomes = [_result(future, sample_timeout, deadline) for future in futures]
            connection.send(outcomes)
            if any(reason == OUT_OF_TIME for _, reason in outcomes):
                pool.stop()  # with what is still queued
                pool.join()
                pool = ProcessPool(num_workers, initializer=_prepare_worker, context=fork)
        except (EOFError, ConnectionError):
            return


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
    finally:
        # The trainer started us as the leader of our own group: this ends hung workers too, whatever they do.
        os.killpg(os.getpid(), signal.SIGKILL)
