"""llama.cpp's ``llama-server`` on one GGUF file: its logits, and many requests at once.

Its options and the fields of its JSON are those of llama.cpp's ``tools/server/README.md``.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bench.worker import EngineError

HOST = "127.0.0.1"
# Seconds: for a file to be loaded, and for the slowest of many requests.
START, LONGEST = 120.0, 1800.0
# Far above every logit, so that the biased token is the next one.
FORCED = 1e6


def free_port() -> int:
    """Return a port that no program listens on."""
    with socket.socket() as made:
        made.bind((HOST, 0))
        return int(made.getsockname()[1])


class LlamaServer:
    """Program in its own process, with ``rows`` slots of ``length`` tokens.

    It ends with the ``with`` block. Raises EngineError, with the program's last line, if it does
    not start or a request fails. ``name`` is the engine's name in these errors.
    """

    def __init__(
        self, program: Path, file: Path, threads: int, rows: int, length: int, name: str
    ) -> None:
        self.name, self.port = name, free_port()
        # Without a proxy, also if the environment has one.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if not program.is_file():
            raise EngineError(f"there is no program {program}: run `make peers`", name)
        # The prompt cache keeps states between requests, which these measurements do not use.
        options = ["-m", file, "--host", HOST, "--port", self.port, "--no-ui"]
        options += ["-t", threads, "-tb", threads, "-ngl", 0, "-lm", "none", "--cache-ram", 0]
        options += ["--parallel", rows, "-c", rows * (-(-(length + 1) // 256) * 256)]
        self.command = [str(program), *map(str, options)]
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (closed with the server)
        begin = time.perf_counter()
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                # A debugger's lines would come after the one that names the fault.
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )
        except OSError as error:
            self.log.close()
            raise EngineError(str(error), name) from error
        try:
            self._wait(begin + START)
        except BaseException:
            self.close()
            raise
        self.seconds = time.perf_counter() - begin

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def together(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Return the seconds until many greedy requests at once have all ended.

        Raises EngineError if one does not have ``new`` tokens, or did not run its whole prompt.
        """
        bodies = [self._body(ids, new) for ids in prompts]
        with ThreadPoolExecutor(len(bodies)) as threads:
            begin = time.perf_counter()
            answers = list(threads.map(self._complete, bodies))
            seconds = time.perf_counter() - begin
        for ids, found in zip(prompts, answers, strict=True):
            ran = found.get("timings", {}).get("prompt_n"), found.get("tokens_predicted")
            if ran != (len(ids), new):
                raise EngineError(
                    f"it ran {ran[0]} tokens of a prompt of {len(ids)}, "
                    f"and wrote {ran[1]} of {new} tokens",
                    self.name,
                )
        return seconds

    def logits(self, tokens: Sequence[int], steps: int, size: int) -> np.ndarray:
        """Return logits ``[steps, size]`` after ``tokens``, then after ``steps - 1`` tokens 1.

        The server shows log-probabilities. They differ from logits by one number for each row, so
        rows are shifted to a mean of 0.
        """
        body = self._body(tokens, steps) | {"n_probs": size, "logit_bias": [[1, FORCED]]}
        rows = self._complete(body).get("completion_probabilities", [])
        found = np.full((len(rows), size), np.nan, np.float32)
        for place, row in enumerate(rows):
            for entry in row["top_logprobs"]:
                found[place, entry["id"]] = entry["logprob"]
        if [row["id"] for row in rows] != [1] * steps or not np.isfinite(found).all():
            raise EngineError("it did not show the log-probability of every token", self.name)
        return found - found.mean(-1, keepdims=True)

    def _body(self, tokens: Sequence[int], new: int) -> dict[str, Any]:
        return {
            "prompt": list(tokens),
            "n_predict": new,
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 0,
            "samplers": ["temperature"],
            "stream": False,
        }

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request."""
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with self.opener.open(request, timeout=LONGEST) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise EngineError(f"it answered {error.code}: {said}", self.name) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineError(f"a request failed: {error}; {self._said()}", self.name) from error
        if not isinstance(found, dict):
            raise EngineError(f"its answer is not an object: {found!r:.80}", self.name)
        return found

    def _wait(self, until: float) -> None:
        """Wait until the file is loaded."""
        while True:
            try:
                with self.opener.open(f"http://{HOST}:{self.port}/health", timeout=5):
                    return
            except (OSError, http.client.HTTPException):
                pass
            if self.process.poll() is not None:
                code = self.process.returncode
                raise EngineError(f"it ended with code {code}; {self._said()}", self.name)
            if time.perf_counter() > until:
                raise EngineError(f"not ready after {START:.0f} s; {self._said()}", self.name)
            time.sleep(0.01)

    def _said(self) -> str:
        """Return the last line of the program's output, for a message."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"it said: {lines[-1] if lines else 'nothing'}"
