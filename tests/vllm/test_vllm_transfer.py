"""NCCL itself needs GPUs on both sides; here its two ends are stand-ins, and the rest is vLLM's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.rollout.vllm.client import ServerClient, ServerDownError
from fastgrpo.rollout.vllm.transfer import NCCLTransfer
from fastgrpo.rollout.vllm.weights import checkpoint_weights

from .cases import make_policy, optimizer_step

pytestmark = pytest.mark.vllm


class StandIn:
    """What vLLM's trainer engine is asked; keeps what it would have sent."""

    made: list[StandIn]

    def __init__(self, info: Any, *, client: Any, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        self.sent: list[dict[str, torch.Tensor]] = []
        self.open = True
        StandIn.made.append(self)

    def send_weights(self) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine as Real

        # vLLM's own check that metadata and weights agree
        self.sent.append({n: t.clone() for n, t in Real._checked_iter(self.source, self.source.metadata())})

    def shutdown(self) -> None:
        self.open = False


@pytest.fixture
def transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NCCLTransfer:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    StandIn.made = []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", StandIn)
    monkeypatch.setattr(ServerClient, "world_size", lambda self: 2)
    return NCCLTransfer(make_policy(), tmp_path, "10.0.0.7")


def test_a_server_has_a_link_that_is_kept_until_it_is_dropped(transfer: NCCLTransfer, tmp_path: Path) -> None:
    assert not list(tmp_path.glob("*.safetensors"))
    client, other = ServerClient("http://one:1", 1.0), ServerClient("http://two:2", 1.0)
    policy = make_policy(seed=1)
    for _ in range(2):
        optimizer_step(policy.model)
        transfer.prepare(policy)
        transfer.send(client)
        expected = dict(checkpoint_weights(policy))
        sent = StandIn.made[0].sent[-1]
        assert sent.keys() == expected.keys()
        assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())
    transfer.send(other)
    transfer.drop(client)
    transfer.drop(client)
    transfer.send(client)
    assert [link.client.base_url for link in StandIn.made] == [client.url, other.url, client.url]
    assert [link.open for link in StandIn.made] == [False, True, True]
    info = StandIn.made[0].info
    assert (info.master_address, info.world_size, info.is_sender) == ("10.0.0.7", 3, True)
    assert len({link.info.master_port for link in StandIn.made}) > 1


def test_a_server_that_fails_is_down(transfer: NCCLTransfer, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def fail(self: StandIn) -> None:
        raise requests.ConnectionError("gone")

    monkeypatch.setattr(StandIn, "send_weights", fail)
    with pytest.raises(ServerDownError, match="http://one:1: gone"):
        transfer.send(ServerClient("http://one:1", 1.0))
