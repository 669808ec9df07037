"""One vLLM server over HTTP: completions by token ids, and the routes that VLLM_SERVER_DEV_MODE=1 adds."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastgrpo.errors import RunError

Sample = tuple[list[int], list[float], bool]
"""Token ids, their log-probs, and whether the completion ended by itself."""


class ServerDownError(Exception):
    """No answer, or one that says the server cannot work: somebody else should be asked, or the same one later."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself: vLLM's version, "cpu" or "cuda", its log-probs, its worker extension or "", and
    whether it computes long prompts in pieces."""

    version: str
    device: str
    logprobs_mode: str
    extension: str
    chunked_prefill: bool


class ServerClient:
    """Calls one server; any number of threads may share it.

    url:     where it listens, e.g. "http://node7:8000".
    timeout: seconds without an answer after which it counts as hung.

    Every call raises `ServerDownError` when the server does not answer in time, breaks off or fails (HTTP 5xx), and
    `RunError` when it refuses (4xx): asking again would not help.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        # No proxies: they are for the world outside, and would answer in a dead server's place.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def complete(self, token_ids: list[int], options: dict[str, Any]) -> list[Sample]:
        """One prompt's samples, in order; `options` are those of /v1/completions."""
        body = {"model": self._model, "prompt": token_ids, "return_token_ids": True, **options}
        choices = sorted(self._call("POST", "/v1/completions", body)["choices"], key=lambda c: c["index"])
        if any(c["finish_reason"] not in ("stop", "length") for c in choices):
            raise ServerDownError(f"{self.url} broke a completion off ({choices[0]['finish_reason']})")
        return [(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"] == "stop") for c in choices]

    def healthy(self) -> bool:
        """Does it answer /health within five seconds?"""
        try:
            self._call("GET", "/health", timeout=5.0)
        except ServerDownError:
            return False
        return True

    def wait(self, timeout: float) -> None:
        """Return once it is healthy. Raises `ServerDownError` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.healthy():
            if time.monotonic() > deadline:
                raise ServerDownError(f"{self.url} has not answered for {timeout:.0f} s")
            time.sleep(0.2)

    def info(self) -> ServerInfo:
        """Ask for `ServerInfo`; takes seconds, the server looks around its machine."""
        config = self._call("GET", "/server_info?config_format=json")["vllm_config"]
        return ServerInfo(
            version=self._call("GET", "/version")["version"],
            device=config["device_config"]["device"],
            logprobs_mode=config["model_config"]["logprobs_mode"],
            extension=config["parallel_config"]["worker_extension_cls"] or "",
            chunked_prefill=config["scheduler_config"]["enable_chunked_prefill"],
        )

    def world_size(self) -> int:
        """Its workers: tensor x pipeline x data parallel."""
        return int(self._call("GET", "/get_world_size")["world_size"])

    def pause(self) -> None:
        """Stop scheduling; requests that run are kept, and go on after `resume`."""
        self._call("POST", "/pause?mode=keep")

    def resume(self) -> None:
        """Go on after `pause`."""
        self._call("POST", "/resume")

    def abort(self) -> None:
        """End every request that runs."""
        self._call("POST", "/abort_requests", {}, timeout=5.0)

    def worker_call(self, method: str, **arguments: str) -> None:
        """Call a method of the server's workers."""
        self._call("POST", "/collective_rpc", {"method": method, "kwargs": arguments})

    def forget_prefixes(self) -> None:
        """Empty the prefix cache; requests that run are computed again from their start, with the weights of now."""
        if not self._call("POST", "/reset_prefix_cache?reset_running_requests=true")["success"]:
            raise ServerDownError(f"{self.url} kept its prefix cache")

    def set_version(self, version: int) -> None:
        """Note the weights' version there, for people who look (GET /weight_info)."""
        self._call("POST", "/update_weight_version", {"new_version": str(version)})

    @cached_property
    def _model(self) -> str:
        """The name its model is served by."""
        return str(self._call("GET", "/v1/models")["data"][0]["id"])

    def _call(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout or self._timeout) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(path, error.code, " ".join(error.read().decode(errors="replace").split())) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerDownError(f"{self.url}{path}: {error or type(error).__name__}") from error
        return json.loads(answer) if answer else None

    def _refusal(self, path: str, status: int, message: str) -> Exception:
        """The error for an HTTP status that is one, with the server's own words."""
        if status >= 500:
            return ServerDownError(f"{self.url}{path}: HTTP {status}, {message[:300]}")
        if status == 404 and not path.startswith(("/v1/", "/health")):
            return RunError(f"{self.url} has no {path}: start it with VLLM_SERVER_DEV_MODE=1, and vLLM >= 0.32")
        return RunError(f"{self.url}{path} was refused: {message[:300]}")
