"""`python -m fastgrpo.rollout.vllm.serve ARGUMENTS`: vLLM's own server, which ends when whoever started it does.

Its standard input is a pipe that nothing is written to. When that closes, killed trainers included, so does the server:
nothing stays behind and holds a GPU.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

_GRACE_SECONDS = 10.0


def main() -> None:
    """Serve until told to end, or until standard input closes. Must lead its process group."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def _end_with_parent() -> None:
    while os.read(0, 1):  # the bare descriptor: Python's own reader must not be busy when the server ends by itself
        continue
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
