"""Do the rollout engine and the trainer give the same tokens the same log-probs? Asked once, of the first samples."""

from __future__ import annotations

import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.errors import RunError
from fastgrpo.packing import pack
from fastgrpo.policy import Policy
from fastgrpo.records import Rollout

# The mean difference per token that two right implementations may have. In 16 bits they round differently in every
# layer, by 0.01 to 0.03 per token. A temperature of 0.9 taken for 1 is off by 0.04 where the policy has half a nat of
# entropy, so in 16 bits a small mistake can pass; the sampling metrics then show it.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
_SAMPLES = 8


class EngineDisagrees(RunError):
    """The engine's log-probs are not those of the distribution that is trained."""


def check_agreement(policy: Policy, rollouts: list[Rollout], config: GRPOConfig) -> float | None:
    """Compare the first samples' log-probs with the policy's own forward; the mean difference per token.

    None when no sample has any. Where the engine filters (top-k, top-p, min-p) its log-probs may exceed the policy's.
    Raises EngineDisagrees when they differ by more than rounding explains.
    """
    samples = [r for r in rollouts if r.num_tokens and bool(r.sampling_logprob.isfinite().all())][:_SAMPLES]
    if not samples:
        return None
    differences = []
    for packed in policy.placed(pack(samples, max_tokens=config.max_tokens_per_microbatch, share=policy.shares)):
        own = policy.logprobs(packed, config.temperature)[0].cpu()
        reported = torch.cat([samples[m].sampling_logprob for m in packed.members])
        difference = own - reported
        differences.append(difference.clamp(min=0) if config.filters else difference.abs())
    mean = torch.cat(differences).mean().item()
    allowed = _TOLERANCE[policy.dtype]
    if not mean <= allowed:
        raise EngineDisagrees(
            f"the rollout engine's log-probs differ from the trainer's by {mean:.2g} per token on average, where "
            f"{allowed} is explained by rounding: its weights, temperature, dtype or tokenizer are other ones. Set "
            "check_sampling=false to go on all the same, sampling_correction to weigh the difference"
        )
    return mean
