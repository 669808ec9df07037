"""The suites, each some modules of cases, and the peers that their cases name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from benchmarks.cases import OURS, Case

SUITES = {
    "ops": ("test_head", "test_logits", "test_small_ops", "test_attention"),
    "update": ("test_update", "test_shared_prompts", "test_update_trl"),
    "rollout": ("test_rollout",),
    "memory": ("test_memory",),
    "train": ("test_train_trl",),
}
"""Modules of this package. Training comes last: it sets the process's threads to one."""

ON_A_GPU = {"ops", "memory"}
"""Suites whose cases run on either device. `gpu_suite` has stages for the others."""

PEERS = {
    OURS: "this project",
    "naive": "what one would write: all logits in fp32, loops over sequences",
    "torch_compile": "the naive code under torch.compile",
    "torch": "torch's own op for the job",
    "trl": "TRL 1.16: its chunked head, its GRPOTrainer",
    "trl-whole": "TRL with all sequences in one micro-batch",
    "liger": "liger-kernel 0.8.5, LigerFusedLinearGRPOLoss",
    "cce": "cut-cross-entropy 25.1.1: its kernels on a GPU, its PyTorch path on a CPU",
    "transformers": "transformers' generate",
    "padded": "transformers' forward of padded rows, full logits",
    "unshared": "this project, prompts repeated",
    "plain": "this project, told not to share prompts",
}


def cases(suites: Iterable[str], peers: Iterable[str] = (), full: bool = False) -> list[Case]:
    """The suites' cases, of these peers and ours (all, if none is named), and with `full` the large sizes as well."""
    found: list[Case] = []
    for suite in suites:
        for module in SUITES[suite]:
            found += select(importlib.import_module(f"benchmarks.{module}"), peers, full)
    return found


def select(module: object, peers: Iterable[str] = (), full: bool = False) -> list[Case]:
    """Those of one module."""
    wanted = {*peers, OURS} if peers else PEERS.keys()
    every: list[Case] = [*module.CASES, *(getattr(module, "MORE", []) if full else [])]  # type: ignore[attr-defined]
    return [case for case in every if case.peer in wanted]
