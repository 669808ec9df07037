"""Rollouts from stock vLLM servers: given by their addresses, or started and looked after by us on this machine.

A request is a prompt with all its samples. Servers take requests as they have room; what a dead, hung or restarted
server did not answer goes to another one, or to the same after it is back. A server gets the current weights before it
serves (again). Not done here: servers started on other machines, sleeping servers (they have devices of their own).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastgrpo.errors import RunError
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.vllm.client import Sample, ServerClient, ServerDownError
from fastgrpo.rollout.vllm.process import ServerProcess
from fastgrpo.rollout.vllm.queue import RequestQueue
from fastgrpo.rollout.vllm.requests import (
    CPU_ARGUMENTS,
    ENVIRONMENT,
    check_version,
    import_vllm,
    sampling_options,
    to_rollouts,
)
from fastgrpo.rollout.vllm.transfer import FolderTransfer, NCCLTransfer, Transfer

_EXTENSION = "fastgrpo.rollout.vllm.worker.PolicyWorker"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which servers, and how patient to be with them. Times in seconds.

    urls:            servers that run already, with VLLM_SERVER_DEV_MODE=1, `--logprobs-mode processed_logprobs` and
                     `--generation-config vllm`.
    devices:         servers to start here, one for each entry, its CUDA_VISIBLE_DEVICES ("1" or "2,3"; "" on a CPU).
    arguments:       more arguments for those, e.g. ["--tensor-parallel-size", "2"].
    max_length:      longest prompt and completion together in tokens, for those; None = the model's context.
    transfer:        "nccl" from GPU to GPU, "folder" through a folder that all servers see.
    folder:          that folder; None = a temporary one, which servers on other machines do not see.
    log_folder:      where the output of servers started here goes; None = a temporary one, gone at the end.
    address:         this machine as the servers reach it, for NCCL.
    concurrency:     prompts a server works on at once.
    max_attempts:    how often a request may fail before the step does.
    request_timeout: for one prompt's samples; a server that takes longer counts as hung.
    step_timeout:    for a whole `generate`; None = no limit.
    start_timeout:   for a server to come up or come back.
    """

    urls: Sequence[str] = ()
    devices: Sequence[str] = ()
    arguments: Sequence[str] = ()
    max_length: int | None = None
    transfer: Literal["nccl", "folder"] = "folder"
    folder: str | None = None
    log_folder: str | None = None
    address: str = "127.0.0.1"
    concurrency: int = 64
    max_attempts: int = 3
    request_timeout: float = 1800.0
    step_timeout: float | None = None
    start_timeout: float = 600.0


@dataclass
class _Server:
    """A server as the engine knows it.

    process:    None when it is not ours to start.
    pack_heads: its workers have our extension and run on a CPU.
    version:    of the weights it has.
    lives:      how often it was brought back, or given up.
    given_up:   why it is not asked any more; None while it is.
    """

    client: ServerClient
    process: ServerProcess | None = None
    pack_heads: bool = False
    version: int = -1
    lives: int = 0
    given_up: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class VLLMServerEngine:
    """Generates with vLLM servers.

    `generate` may run in a thread while `sync` is called: what runs then goes on with the new weights, and its samples'
    `weights_version` is that of the oldest they may come from.
    Raises ImportError, ValueError or RunError, in one line, for servers that are missing, wrong or do not start.
    """

    def __init__(self, policy: Any, options: ServerOptions) -> None:
        if not options.urls and not options.devices:
            raise ValueError("rollout_engine 'vllm_server' needs addresses of servers, or devices to start them on")
        self.options = options
        self.version = 0
        self._policy = policy
        self._servers: list[_Server] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="fastgrpo-vllm-")
        folder = Path(options.folder or self._temporary.name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._transfer = self._make_transfer(folder)
            self._servers += [_Server(self._client(url)) for url in options.urls]
            for i in range(len(options.devices)):
                self._servers.append(self._own_server(i, folder))
            self._for_each_server(self._admit)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Sampling, done: Callable[[list[Rollout]], None] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`. Raises RunError when no server is left, or a limit of the options is passed."""
        queue: RequestQueue[list[Rollout]] = RequestQueue(len(prompts), self.options.max_attempts)
        usable = [s for s in self._servers if s.given_up is None]
        for server in usable:
            for _ in range(min(self.options.concurrency, len(prompts))):
                threading.Thread(target=self._serve, args=(server, queue, prompts, n, sampling), daemon=True).start()
        try:
            if not usable:
                raise self._all_given_up()
            answers: dict[int, list[Rollout]] = {}
            for group, rollouts in queue.answers(self.options.step_timeout):
                answers[group] = rollouts
                if done is not None:
                    done(rollouts)
        except BaseException as error:
            queue.fail(error)
            self._abort()
            raise
        return [rollout for group in range(len(prompts)) for rollout in answers[group]]

    def sync(self, policy: Any) -> None:
        """Bring the policy's weights to every server; those that fail are brought back, with the weights."""
        self._policy = policy
        self.version += 1
        self._transfer.prepare(policy)
        self._for_each_server(self._renew)

    def sleep(self) -> None:
        """Servers keep their memory."""

    def wake(self) -> None:
        """Bring back servers that have died since the last call, and use again what had been given up and answers."""
        self._for_each_server(self._check)

    def close(self) -> None:
        """Stop the servers that are ours; a second call does nothing."""
        for server in self._servers:
            if server.process is not None:
                server.process.close()
        self._servers = []
        self._temporary.cleanup()

    # ------------------------------------------------------------------------------------------------- the requests

    def _serve(
        self, server: _Server, queue: RequestQueue[list[Rollout]], prompts: list[Prompt], n: int, sampling: Sampling
    ) -> None:
        """One of a server's threads: take requests until nothing is left to do, or the server is given up."""
        try:
            while (group := queue.take()) is not None:
                lives, version = server.lives, server.version
                options = sampling_options(self._policy, sampling, group, n)
                try:
                    samples: list[Sample] = server.client.complete(prompts[group].token_ids, options)
                except ServerDownError as error:
                    if not queue.give_back(group, (server.client.url, lives), error):
                        return
                    if not self._bring_back(server, lives, str(error)):
                        if all(s.given_up is not None for s in self._servers):
                            queue.fail(self._all_given_up())
                        return
                else:
                    queue.answer(group, to_rollouts(self._policy, prompts[group], group, sampling, samples, version))
        except Exception as error:
            queue.fail(error)

    def _abort(self) -> None:
        """End what still runs on the servers, as far as they can be reached."""
        for server in self._servers:
            with contextlib.suppress(ServerDownError, RunError):
                server.client.abort()

    def _all_given_up(self) -> RunError:
        reasons = "; ".join(str(s.given_up) for s in self._servers)
        return RunError(f"no vLLM server is left: {reasons}")

    # -------------------------------------------------------------------------------------------------- the servers

    def _make_transfer(self, folder: Path) -> Transfer:
        if self.options.transfer == "nccl":
            return NCCLTransfer(self._policy, folder, self.options.address)
        return FolderTransfer(self._policy, folder)

    def _client(self, url: str) -> ServerClient:
        return ServerClient(url, self.options.request_timeout)

    def _own_server(self, number: int, folder: Path) -> _Server:
        import_vllm()
        on_cpu = self._policy.device.type == "cpu"
        dtype = str(self._policy.dtype).removeprefix("torch.")
        arguments = ["--model", str(folder), "--served-model-name", "policy", "--dtype", dtype]
        arguments += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        arguments += ["--worker-extension-cls", _EXTENSION, "--disable-log-stats", *self._transfer.arguments]
        if self.options.max_length is not None:
            arguments += ["--max-model-len", str(self.options.max_length)]
        environment = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
        if on_cpu:
            arguments += [word for name, value in CPU_ARGUMENTS.items() for word in _flag(name, value)]
        else:
            environment |= {"CUDA_VISIBLE_DEVICES": self.options.devices[number]}
        logs = Path(self.options.log_folder or self._temporary.name)
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"vllm-server-{number}.log"
        process = ServerProcess([*arguments, *self.options.arguments], environment, log)
        process.start()
        return _Server(self._client(process.url), process, pack_heads=on_cpu)

    def _for_each_server(self, do: Callable[[_Server], None]) -> None:
        """All servers at once. Raises the first error, after all have ended."""
        with ThreadPoolExecutor(max(1, len(self._servers))) as pool:
            for future in [pool.submit(do, server) for server in self._servers]:
                future.result()
        if self._servers and all(s.given_up is not None for s in self._servers):
            raise self._all_given_up()

    def _admit(self, server: _Server) -> None:
        """A server's first weights, and whether it is one we can use."""
        try:
            self._await(server)
            if server.process is None:
                server.pack_heads = self._inspect(server.client)
            self._push(server)
        except ServerDownError as error:
            raise RunError(f"a vLLM server cannot be used: {error}") from error

    def _inspect(self, client: ServerClient) -> bool:
        """Refuse a given server whose samples would be wrong. Returns whether its packed heads must be renewed."""
        info = client.info()
        check_version(info.version)
        if info.logprobs_mode != "processed_logprobs":
            raise RunError(f"{client.url} must be started with --logprobs-mode processed_logprobs")
        tied = getattr(self._policy.causal_lm.config.get_text_config(), "tie_word_embeddings", False)
        on_cpu = info.device == "cpu"
        if on_cpu and info.chunked_prefill:
            raise RunError(
                f"{client.url} runs on a CPU: start it with --no-enable-chunked-prefill, seeds crash it else"
            )
        if on_cpu and tied and info.extension != _EXTENSION:
            raise RunError(
                f"{client.url} runs on a CPU, where vLLM does not reload tied LM heads: start it with "
                f"--worker-extension-cls {_EXTENSION}"
            )
        return on_cpu and info.extension == _EXTENSION

    def _await(self, server: _Server) -> None:
        """Wait until it answers."""
        if server.process is not None:
            server.process.wait(server.client, self.options.start_timeout)
        else:
            server.client.wait(self.options.start_timeout)

    def _push(self, server: _Server) -> None:
        """Load the current weights. Running requests go on with them, their caches computed afresh."""
        version = self.version
        server.client.pause()
        try:
            self._transfer.send(server.client)
            if server.pack_heads:
                server.client.worker_call("pack_policy_heads")
            server.client.forget_prefixes()
            server.client.set_version(version)
        finally:
            server.client.resume()
        server.version = version

    def _renew(self, server: _Server) -> None:
        lives = server.lives
        try:
            with server.lock:
                if server.given_up is None:
                    self._push(server)
        except ServerDownError as error:
            self._bring_back(server, lives, str(error))

    def _check(self, server: _Server) -> None:
        lives, healthy = server.lives, server.client.healthy()
        if server.given_up is None and not healthy:
            self._bring_back(server, lives, f"{server.client.url} does not answer")
        elif server.given_up is not None and healthy and server.process is None:
            server.given_up = None  # somebody has put it right
            self._renew(server)

    def _bring_back(self, server: _Server, lives: int, cause: str) -> bool:
        """Start a server again, or wait for one that is not ours, and load the weights; of many callers one does it.

        lives: as the caller saw them when the server failed. Returns False once the server is given up.
        """
        with server.lock:
            if server.lives == lives:
                try:
                    if server.process is not None:
                        server.process.start()
                    self._await(server)
                    self._transfer.drop(server.client)
                    self._push(server)
                except (ServerDownError, RunError) as error:
                    server.given_up = f"{cause}, and it did not come back: {error}"
                server.lives += 1
            return server.given_up is None


def _flag(name: str, value: bool | int) -> list[str]:
    """An engine argument as vLLM's command line has it: `--name`, `--no-name` or `--name value`."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", str(value)]
