"""Models, prompts and the comparison with a full forward, for all vLLM tests."""

from __future__ import annotations

from typing import Any

import torch
from helpers import make_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastgrpo.policy import Policy
from fastgrpo.records import Prompt, Rollout

EOS = 2


def make_model(*, tied: bool = True, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of about 70,000 parameters in fp32, with the smallest heads that vLLM's CPU attention knows (32)."""
    config = Qwen3Config(
        vocab_size=105,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float().eval()


def make_policy(*, tied: bool = True, seed: int = 0) -> Policy:
    return Policy(make_model(tied=tied, seed=seed), make_tokenizer())


def make_prompts(*lengths: int) -> list[Prompt]:
    """Prompts of these lengths; the longer ones fill several blocks of vLLM's cache."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 105, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(i, "", token_ids) for i, token_ids in enumerate(ids)]


@torch.no_grad()
def logprob_error(model: Any, rollouts: list[Rollout], temperature: float) -> float:
    """Largest difference of the rollouts' log-probs from those of a full fp32 forward."""
    worst = 0.0
    for r in rollouts:
        prompt, completion = r.prompt.token_ids, torch.tensor(r.token_ids)
        logits = model(torch.tensor([prompt + r.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.float() / temperature, -1).gather(1, completion[:, None])[:, 0]
        worst = max(worst, (expected - r.sampling_logprob).abs().max().item())
    return worst


def optimizer_step(model: Any, seed: int = 0) -> None:
    """One AdamW step on random tokens: every trained weight moves by about 0.02."""
    ids = torch.randint(5, 105, (2, 16), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
