"""What is known of GPUs: memory, and the rates that their makers state. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run's tensors are.

    name:       for people.
    memory:     bytes.
    flops:      dense bf16 FLOP/s by its maker; None = not known.
    bandwidth:  bytes/s of its memory by its maker; None = not known.
    capability: CUDA's major compute capability; 0 = a CPU.
    """

    name: str
    memory: int
    flops: float | None = None
    bandwidth: float | None = None
    capability: int = 0

    @property
    def is_gpu(self) -> bool:
        """It is not a CPU."""
        return self.capability > 0


# By name: GB (1e9 bytes, a little less than there is), TFLOP/s, GB/s, compute capability, and words of the name that
# CUDA gives.
_KNOWN: dict[str, tuple[int, float, float, int, tuple[str, ...]]] = {
    "b200": (180, 2250, 8000, 10, ("B200",)),
    "h200": (141, 989, 4800, 9, ("H200",)),
    "h100": (80, 989, 3350, 9, ("H100",)),
    "a100-80": (80, 312, 2039, 8, ("A100", "80GB")),
    "a100-40": (40, 312, 1555, 8, ("A100",)),
    "l40s": (48, 362, 864, 8, ("L40S",)),
    "a6000": (48, 155, 768, 8, ("A6000",)),
    "5090": (32, 209, 1792, 12, ("5090",)),
    "4090": (24, 165, 1008, 8, ("4090",)),
    "3090": (24, 71, 936, 8, ("3090",)),
    "l4": (24, 121, 300, 8, ("L4",)),
}

GPUS: dict[str, Device] = {
    name: Device(name.upper(), round(memory * 1e9), flops * 1e12, bandwidth * 1e9, capability)
    for name, (memory, flops, bandwidth, capability, _) in _KNOWN.items()
}
"""GPUs by the name that the command line knows them by."""


def gpu_of(cuda_name: str) -> Device | None:
    """The GPU that CUDA calls so, such as "NVIDIA H200"; None where it is not known."""
    words = set(cuda_name.replace("-", " ").split())
    return next((GPUS[name] for name, (*_, marks) in _KNOWN.items() if words.issuperset(marks)), None)
