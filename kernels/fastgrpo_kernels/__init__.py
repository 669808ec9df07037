"""Fused losses for GRPO-style training of language models: torch (and triton) only, usable from any trainer.

Every op takes packed tensors: N completion tokens without padding, S sequences bounded by `cu_seqlens`.
"""

from .add_rms_norm.op import add_rms_norm
from .decode_attention.op import decode_attention
from .gae.op import gae
from .group_advantages.op import GroupRewards, group_advantages
from .grpo_loss.config import LossConfig
from .grpo_loss.op import grpo_loss
from .grpo_loss.output import LossOutput
from .head.operands import LoRADelta
from .head.plan import HeadPlan, watch_plans
from .layout import PackedLayout
from .linear_grpo_loss.op import linear_grpo_loss
from .linear_logprob.op import linear_logprob
from .rotate_heads.op import rotate_heads
from .sample_tokens.op import sample_tokens
from .shared_prefix_attention.backends import describe as attention_backends
from .shared_prefix_attention.op import shared_prefix_attention, why_not_flash
from .swiglu.op import swiglu
from .token_logprob.op import token_logprob

__all__ = [
    "GroupRewards",
    "HeadPlan",
    "LoRADelta",
    "LossConfig",
    "LossOutput",
    "PackedLayout",
    "add_rms_norm",
    "attention_backends",
    "decode_attention",
    "gae",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "rotate_heads",
    "sample_tokens",
    "shared_prefix_attention",
    "swiglu",
    "token_logprob",
    "watch_plans",
    "why_not_flash",
]
