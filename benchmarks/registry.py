"""The suites, each some modules of cases, and the peers that their cases name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Choice:
    """Which cases: of these peers and ours (all, if none is named), the large sizes too, names with this word alone."""

    peers: Sequence[str] = ()
    full: bool = False
    word: str = ""

    def of(self, module: Any) -> list[Case]:
        """Those of a module."""
        every: list[Case] = [*module.CASES, *(getattr(module, "MORE", []) if self.full else [])]
        wanted = {*self.peers, OURS} if self.peers else PEERS.keys()
        return [case for case in every if case.peer in wanted and self.word in case.name]

    def of_name(self, module: str) -> list[Case]:
        """Those of a module of this package."""
        return self.of(importlib.import_module(f"benchmarks.{module}"))

    def of_suites(self, suites: Iterable[str]) -> list[Case]:
        """Those of all modules of these suites."""
        return [case for suite in suites for module in SUITES[suite] for case in self.of_name(module)]
