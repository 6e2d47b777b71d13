"""Programs that answer like llama.cpp's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Answers like llama-bench, and writes down what it was asked.
BENCH = """
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(here.with_name("asked"), "a") as file:
    file.write(json.dumps(given) + "\\n")
{body}
ran = {{"n_prompt": int(given["-p"]), "n_gen": int(given["-n"]), "n_depth": int(given["-d"])}}
rate = 100.0 if ran["n_gen"] else 900.0
found = {{"build_commit": "abc", "build_number": 7, "n_threads": int(given["-t"]), **ran}}
print(json.dumps([{{**found, "samples_ns": [1], "samples_ts": [rate]}}]))
"""

# Answers like llama-server: it is ready at the second health check, and answers when a request for
# each slot has come. Logits are 2 for the forced token, and the row's number elsewhere.
SERVER = """
import math, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

given = {{key: sys.argv[sys.argv.index(key) + 1] for key in ("-m", "--port", "--parallel", "-c")}}
print("loading", given["-m"], flush=True)
looks, gate = [], threading.Barrier(int(given["--parallel"]), timeout=10)


class Handler(BaseHTTPRequestHandler):
    def answer(self, code, found):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def do_GET(self):
        looks.append(self.path)
        self.answer(503 if len(looks) < 2 else 200, {{}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(here.with_name("requests"), "a") as file:
            file.write(json.dumps({{**asked, "path": self.path}}) + "\\n")
        found = {{
            "tokens_predicted": asked["n_predict"],
            "timings": {{"prompt_n": len(asked["prompt"])}},
        }}
        if size := asked.get("n_probs"):
            rows = []
            for row in range(asked["n_predict"]):
                logits = [2.0 if i == 1 else float(row % 2 and i % 2) for i in range(size)]
                shift = math.log(sum(map(math.exp, logits)))
                top = [{{"id": i, "logprob": x - shift}} for i, x in enumerate(logits)]
                rows.append({{"id": 1, "top_logprobs": top[::-1]}})
            found["completion_probabilities"] = rows
        else:
            gate.wait()
        {body}
        self.answer(200, found)


ThreadingHTTPServer.request_queue_size = 99
ThreadingHTTPServer(("127.0.0.1", int(given["--port"])), Handler).serve_forever()
"""


def _program(path: Path, text: str) -> Path:
    head = (
        f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\nhere = Path(__file__)\n"
    )
    path.write_text(head + text, encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_bench(folder: Path, body: str = "") -> Path:
    """Write ``llama-bench``, with ``body`` run before it answers."""
    return _program(folder / "llama-bench", BENCH.format(body=body))


def fake_server(folder: Path, body: str = "pass", start: str = "") -> Path:
    """Write ``llama-server``; ``body`` runs before it answers, ``start`` before it listens."""
    return _program(folder / "llama-server", start + "\n" + SERVER.format(body=body))


def asked(folder: Path, what: str = "asked") -> list[dict[str, str]]:
    """Lines that a program has written down."""
    return [json.loads(line) for line in (folder / what).read_text("utf-8").splitlines()]
