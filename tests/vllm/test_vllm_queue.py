"""What becomes of requests when servers die. Needs no vLLM: the servers are made up here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fastgrpo.errors import RunError
from fastgrpo.records import Rollout, Sampling
from fastgrpo.rollout.vllm.queue import RequestQueue
from fastgrpo.rollout.vllm.server import ServerOptions, VLLMServerEngine

from .cases import make_policy, make_prompts

SAMPLING = Sampling(max_tokens=3, seed=5)


class FakeServer:
    """Speaks vLLM's HTTP; `behave(path, body)` may return (status, answer) of its own, or raise to break off."""

    def __init__(self, behave: Callable[[str, Any], tuple[int, Any] | None] = lambda path, body: None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.behave = behave
        self.info = {
            "device_config": {"device": "cuda"},
            "model_config": {"logprobs_mode": "processed_logprobs"},
            "parallel_config": {"worker_extension_cls": ""},
            "scheduler_config": {"enable_chunked_prefill": True},
        }
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null"))

            def answer(self, body: Any) -> None:
                fake.calls.append((self.path, body))
                try:
                    status, answer = fake.behave(self.path, body) or (200, fake.usual(self.path, body))
                except ConnectionError:
                    self.close_connection = True
                    return
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # callers that hang up are meant to
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def usual(self, path: str, body: Any) -> Any:
        """Sample k of a prompt: its first token, its seed modulo 100, and the end of sequence."""
        if path == "/v1/completions":
            ids = [body["prompt"][0], body["seed"] % 100, 2]
            logprobs = {"token_logprobs": [-1.0, -2.0, -3.0]}
            choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}
            return {"choices": [choice | {"index": k} for k in reversed(range(body["n"]))]}
        answers = {
            "/v1/models": {"data": [{"id": "policy"}]},
            "/version": {"version": "0.32.0"},
            "/server_info?config_format=json": {"vllm_config": self.info},
            "/reset_prefix_cache?reset_running_requests=true": {"success": True},
        }
        return answers.get(path)

    def count(self, path: str) -> int:
        return sum(called == path for called, _ in self.calls)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    """Two servers."""
    servers = [FakeServer(), FakeServer()]
    yield servers
    for server in servers:
        server.close()


def make_engine(servers: list[FakeServer], **changes: Any) -> VLLMServerEngine:
    given = {"urls": [s.url for s in servers], "request_timeout": 5.0, "start_timeout": 0.3, "concurrency": 4}
    return VLLMServerEngine(make_policy(), ServerOptions(**given | changes))


def test_every_prompt_is_answered_once_in_order(fakes: list[FakeServer]) -> None:
    engine, prompts = make_engine(fakes), make_prompts(*range(1, 21))
    told: list[tuple[int, list[Rollout]]] = []
    rollouts = engine.generate(prompts, 3, SAMPLING, lambda group: told.append((threading.get_ident(), group)))
    assert {thread for thread, _ in told} == {threading.get_ident()}
    assert sorted(id(r) for _, group in told for r in group) == sorted(id(r) for r in rollouts)
    assert len(told) == 20
    assert [r.group for r in rollouts] == [i for i in range(20) for _ in range(3)]
    assert all(r.token_ids[0] == r.prompt.token_ids[0] for r in rollouts)
    assert all(r.finished and r.sampling_logprob.tolist() == [-1.0, -2.0, -3.0] for r in rollouts)
    assert len({r.token_ids[1] for r in rollouts}) > 10  # a seed for each prompt
    assert sum(fake.count("/v1/completions") for fake in fakes) == 20
    assert all(fake.count("/v1/completions") for fake in fakes)
    engine.close()
    engine.close()


@pytest.mark.parametrize("failure", ["breaks off", "error 500", "aborts"])
def test_what_one_server_leaves_undone_another_does(fakes: list[FakeServer], failure: str) -> None:
    def fail(path: str, body: Any) -> tuple[int, Any] | None:
        if path != "/v1/completions":
            if path == "/health" and fakes[0].count("/v1/completions"):
                raise ConnectionError
            return None
        if failure == "breaks off":
            raise ConnectionError
        if failure == "error 500":
            return 500, {"error": "EngineDeadError"}
        aborted = fakes[0].usual(path, body)
        aborted["choices"][0]["finish_reason"] = "abort"
        return 200, aborted

    fakes[0].behave = fail
    engine, prompts = make_engine(fakes), make_prompts(*range(1, 21))
    rollouts = engine.generate(prompts, 2, SAMPLING)
    assert [r.token_ids[0] for r in rollouts] == [p.token_ids[0] for p in prompts for _ in range(2)]
    assert fakes[1].count("/v1/completions") == 20


def test_servers_given_up_are_used_again_once_they_answer(fakes: list[FakeServer]) -> None:
    engine, prompts = make_engine(fakes, max_attempts=100), make_prompts(1, 2)

    def die(path: str, body: Any) -> None:
        raise ConnectionError

    for fake in fakes:
        fake.behave = die
    for _ in range(2):
        with pytest.raises(
            RunError, match=r"no vLLM server is left: .* did not come back: .* has not answered for 0 s"
        ):
            engine.generate(prompts, 2, SAMPLING)
    fakes[1].behave = lambda path, body: None
    fakes[1].calls.clear()
    engine.wake()
    assert [r.group for r in engine.generate(prompts, 2, SAMPLING)] == [0, 0, 1, 1]
    assert fakes[1].count("/collective_rpc") == 1


def test_a_server_gets_the_weights_before_it_serves_again(fakes: list[FakeServer]) -> None:
    """It is gone for a moment and has forgotten everything when it is back."""
    engine = make_engine(fakes[:1])
    fake, failed = fakes[0], threading.Event()

    def fail_once(path: str, body: Any) -> None:
        if path == "/v1/completions" and not failed.is_set():
            failed.set()
            raise ConnectionError

    fake.behave = fail_once
    fake.calls.clear()
    engine.generate(make_prompts(1), 1, SAMPLING)
    paths = [path for path, _ in fake.calls]
    again = len(paths) - 1
    assert paths[again] == "/v1/completions"
    assert paths.index("/v1/completions") < paths.index("/pause?mode=keep") < paths.index("/collective_rpc") < again
    assert paths.index("/collective_rpc") < paths.index("/resume") < again


def test_a_sync_names_the_weights(fakes: list[FakeServer]) -> None:
    engine = make_engine(fakes)
    for fake in fakes:
        fake.calls.clear()
    engine.sync(make_policy(seed=1))
    for fake in fakes:
        order = ["pause?mode=keep", "collective_rpc", "reset_prefix_cache?reset_running_requests=true"]
        assert [path for path, _ in fake.calls] == [f"/{p}" for p in [*order, "update_weight_version", "resume"]]
        assert ("/update_weight_version", {"new_version": "1"}) in fake.calls
    assert {r.weights_version for r in engine.generate(make_prompts(1, 2), 2, SAMPLING)} == {1}


def test_a_request_that_kills_servers_ends_the_step(fakes: list[FakeServer]) -> None:
    def fail(path: str, body: Any) -> tuple[int, Any] | None:
        return (500, "boom") if path == "/v1/completions" and len(body["prompt"]) == 3 else None

    for fake in fakes:
        fake.behave = fail
    with pytest.raises(RunError, match=r"a request to the vLLM servers failed 3 times, last: .* HTTP 500, \"boom\""):
        make_engine(fakes).generate(make_prompts(1, 2, 3, 4), 1, SAMPLING)


def test_a_refused_request_is_not_repeated(fakes: list[FakeServer]) -> None:
    fakes[0].behave = lambda path, body: (400, "out of vocabulary") if path == "/v1/completions" else None
    engine = make_engine(fakes[:1])
    with pytest.raises(RunError, match='was refused: "out of vocabulary"'):
        engine.generate(make_prompts(1), 1, SAMPLING)
    assert fakes[0].count("/v1/completions") == 1


def test_a_hung_server_ends_the_step_in_time(fakes: list[FakeServer]) -> None:
    release = threading.Event()

    def hang(path: str, body: Any) -> None:
        if path == "/v1/completions":
            release.wait(20)

    fakes[0].behave = hang
    engine = make_engine(fakes[:1], step_timeout=0.3)
    started = time.monotonic()
    with pytest.raises(RunError, match="rollouts took more than 0 s: 0 of 2 prompts were done"):
        engine.generate(make_prompts(1, 2), 1, SAMPLING)
    assert time.monotonic() - started < 15
    assert fakes[0].count("/abort_requests") == 1
    release.set()


def test_a_hung_server_is_left_to_the_others(fakes: list[FakeServer]) -> None:
    release = threading.Event()

    def hang(path: str, body: Any) -> None:
        if path == "/v1/completions":
            release.wait(20)

    fakes[0].behave = hang
    engine = make_engine(fakes, request_timeout=0.5, max_attempts=100)
    rollouts = engine.generate(make_prompts(*range(1, 9)), 1, SAMPLING)
    assert [r.group for r in rollouts] == list(range(8))
    release.set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "--logprobs-mode processed_logprobs"),
        ({"device_config": {"device": "cpu"}}, "--no-enable-chunked-prefill"),
        (
            {"device_config": {"device": "cpu"}, "scheduler_config": {"enable_chunked_prefill": False}},
            "--worker-extension-cls",
        ),
    ],
)
def test_a_given_server_that_would_sample_wrongly_is_refused(
    fakes: list[FakeServer], change: dict[str, Any], message: str
) -> None:
    fakes[1].info |= change
    with pytest.raises(RunError, match=message) as error:
        make_engine(fakes)
    assert fakes[1].url in str(error.value)


def test_a_server_without_the_routes_or_without_an_answer_is_refused(fakes: list[FakeServer]) -> None:
    fakes[0].behave = lambda path, body: (404, "Not Found") if path == "/pause?mode=keep" else None
    with pytest.raises(RunError, match=r"has no /pause\?mode=keep: start it with VLLM_SERVER_DEV_MODE=1"):
        make_engine(fakes)
    fakes[1].close()
    with pytest.raises(RunError, match="has not answered for 0 s"):
        make_engine(fakes[1:])
    with pytest.raises(ValueError, match="needs addresses of servers, or devices"):
        make_engine([])


def test_take_waits_for_what_others_may_give_back() -> None:
    queue: RequestQueue[str] = RequestQueue(1, max_attempts=2)
    assert queue.take() == 0
    taken: list[int | None] = []
    waiting = threading.Thread(target=lambda: taken.append(queue.take()))
    waiting.start()
    assert queue.give_back(0, "a", ConnectionError())
    waiting.join()
    assert taken == [0]
    queue.answer(0, "done")
    assert queue.take() is None
    assert list(queue.answers(None)) == [(0, "done")]
    assert not queue.give_back(0, "a", ConnectionError())


def test_many_threads_may_run_into_one_incident() -> None:
    queue: RequestQueue[str] = RequestQueue(1, max_attempts=2)
    for _ in range(5):
        assert queue.take() == 0
        assert queue.give_back(0, ("server", 0), ConnectionError())
    assert queue.take() == 0
    assert not queue.give_back(0, ("server", 1), ConnectionError("gone"))
    with pytest.raises(RunError, match="failed 2 times, last: gone"):
        list(queue.answers(None))
