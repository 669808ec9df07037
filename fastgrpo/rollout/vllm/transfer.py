"""How a policy's weights get to a server: by a folder that both see, or by NCCL through vLLM's weight-transfer API."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, Protocol

import torch

from fastgrpo.rollout.vllm.client import ServerClient, ServerDownError
from fastgrpo.rollout.vllm.process import free_port
from fastgrpo.rollout.vllm.requests import import_vllm
from fastgrpo.rollout.vllm.weights import checkpoint_weights, write_model_folder, write_weights


class Transfer(Protocol):
    """Brings weights to servers; `arguments` are what those we start are started with."""

    arguments: tuple[str, ...]

    def prepare(self, policy: Any) -> None:
        """Take the policy's weights as they stand, once for all servers."""

    def send(self, client: ServerClient) -> None:
        """Load them into a paused server. Raises `ServerDownError`."""

    def drop(self, client: ServerClient) -> None:
        """Forget the connection to a server that died or was started again."""


class FolderTransfer:
    """Through `folder`, a complete model folder that a server can also start from; needs nothing but a shared disk."""

    arguments: tuple[str, ...] = ()

    def __init__(self, policy: Any, folder: Path) -> None:
        self.folder = folder
        write_model_folder(policy, folder)

    def prepare(self, policy: Any) -> None:
        """See `Transfer`."""
        write_weights(policy, self.folder)

    def send(self, client: ServerClient) -> None:
        """See `Transfer`."""
        client.worker_call("reload_weights", weights_path=str(self.folder))

    def drop(self, client: ServerClient) -> None:
        """No connection is held."""


class NCCLTransfer:
    """From the policy's GPU straight to the servers' by vLLM's own NCCL engine, a group for each server.

    A server that dies while weights are on their way leaves NCCL waiting: its own timeout ends that, nothing here can.
    """

    arguments: tuple[str, ...] = ("--load-format", "dummy", "--weight-transfer-config", '{"backend": "nccl"}')

    def __init__(self, policy: Any, folder: Path, address: str) -> None:
        import_vllm()
        write_model_folder(policy, folder, weights=False)
        self._address = address
        self._device = policy.device
        self._source = _make_source(policy)
        self._links: dict[str, Any] = {}
        self._lock = threading.Lock()  # one device, one link at a time

    def prepare(self, policy: Any) -> None:
        """See `Transfer`."""
        self._source.policy = policy

    def send(self, client: ServerClient) -> None:
        """See `Transfer`."""
        with self._lock, torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            try:
                if client.url not in self._links:
                    self._links[client.url] = self._connect(client)
                self._links[client.url].send_weights()
            except OSError as error:  # what the requests library raises
                raise ServerDownError(f"{client.url}: {error}") from error

    def drop(self, client: ServerClient) -> None:
        """See `Transfer`."""
        if link := self._links.pop(client.url, None):
            link.shutdown()

    def _connect(self, client: ServerClient) -> Any:
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=self._address, master_port=free_port(), world_size=1 + client.world_size(), rank=0
        )
        return WeightTransferTrainerFactory.trainer_init(
            info, client=HTTPVLLMWeightSyncClient(client.url), source=self._source
        )


def _make_source(policy: Any) -> Any:
    """The policy's weights as vLLM's `WeightSource`: metadata first, then a fresh pass for every transfer."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        def __init__(self, policy: Any) -> None:
            self.policy = policy
            self._metadata: list[Any] = []

        def metadata(self) -> list[Any]:
            # Names and shapes stay; reading them once spares a second pass, which may merge adapters.
            if not self._metadata:
                self._metadata = [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in checkpoint_weights(self.policy)]
            return self._metadata

        def __iter__(self) -> Any:
            return checkpoint_weights(self.policy)

    return PolicySource(policy)
