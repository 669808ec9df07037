"""The critic: what a state is worth. A body like the policy's, and one linear head on its last hidden states."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.policy import Policy
from fastgrpo.policy.work import decoder_of
from fastgrpo.records import PackedBatch


class Critic:
    """V(s) of the state in which each completion token was chosen: the prompt and the tokens before it.

    body: any causal model; its LM head is neither used nor trained. With adapters, these and the value head train.

    The value head is fp32 (float64 on a float64 body) and begins at 0: a critic that knows nothing says nothing.
    """

    def __init__(self, body: Policy) -> None:
        self.body = body
        width = body.causal_lm.get_input_embeddings().weight.shape[1]
        dtype = torch.promote_types(body.dtype, torch.float32)
        self.value_head = torch.nn.Linear(width, 1, device=body.device, dtype=dtype)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def values(self, batch: PackedBatch) -> Tensor:
        """[N] fp32 (float64 on a float64 body), differentiable."""
        return self.value_head(self.body.hidden(batch).to(self.value_head.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def predict(self, batch: PackedBatch) -> Tensor:
        """`values`, without gradients."""
        with self.body.mode(training=False):
            return self.values(batch)

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) of what trains, in a fixed order."""
        decoder = {id(p) for p in decoder_of(self.body.causal_lm).parameters()}
        own = [(name, p) for name, p in self.body.trainable() if id(p) in decoder]
        return own + [(f"value_head.{name}", p) for name, p in self.value_head.named_parameters()]

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor]) -> None:
        """Take the weights of another critic's `trainable`, bit for bit. Raises ValueError when they do not fit."""
        own = dict(self.trainable())
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (own, saved)]
        if wrong := sorted(n for n in own.keys() | saved.keys() if shapes[0].get(n) != shapes[1].get(n)):
            raise ValueError(f"the checkpoint holds another critic than this run's: {', '.join(wrong[:3])} differ")
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def make_critic(policy: Policy, config: GRPOConfig, peft_config: object = None) -> Critic:
    """A critic that begins as `critic_model`, or else as the policy is now; arguments and errors as of `load_policy`.

    Beginning as the policy, it has copies of what it trains alone: frozen weights and the LM head stay the policy's.
    """
    if config.critic_model is not None:
        try:
            return Critic(load_policy(config.critic_model, policy.tokenizer, config, peft_config))
        except ValueError as error:
            raise ValueError(f"critic_model: {error}") from error
    own = {id(p) for p in decoder_of(policy.causal_lm).parameters() if p.requires_grad}
    shared = {id(p): p for p in policy.model.parameters() if id(p) not in own}
    body = Policy(copy.deepcopy(policy.model, shared), policy.tokenizer)
    body.unshared = policy.unshared
    return Critic(body)
