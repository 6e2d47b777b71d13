from __future__ import annotations
import argparse, base64, json, os, random, statistics, subprocess, sys, time
from pathlib import Path
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
HERE = Path(__file__).resolve().parent


class Remote:
    def __init__(self, name, python=None):
        self.name = name
        python = python or sys.executable
        self.p = subprocess.Popen(
            [python, str(HERE / "worker.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=None if os.environ.get("V") else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )
        self.hello = self._read()

    def _read(self):
        line = self.p.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} died")
        got = json.loads(line)
        if "error" in got:
            raise RuntimeError(got["error"])
        return got["answer"]

    def __call__(self, do, **kw):
        self.p.stdin.write(json.dumps({"do": do, **kw}) + "\n")
        self.p.stdin.flush()
        return self._read()

    def close(self):
        self.p.stdin.close()
        self.p.wait()


def boot(a, b, n=4000):
    r = random.Random(0)
    out = []
    for _ in range(n):
        i = [r.randrange(len(a)) for _ in a]
        out.append(statistics.median(a[j] for j in i) / statistics.median(b[j] for j in i))
    out.sort()
    return out[int(0.025 * n)], out[int(0.975 * n)]


CASES = {  # name: batch, context, steps per turn (0: prefill)
    "decode": (1, 64, 32),
    "prefill512": (1, 512, 0),
    "batch8": (8, 64, 8),
    "context8k": (1, 8192, 16),
}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--size", default="350M")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--rounds", type=int, default=10)
    ap.add_argument("--cases", default="decode,prefill512,batch8,context8k")
    ap.add_argument(
        "--engines", default="lfm2_fast,transformers,llama.cpp BF16,llama.cpp Q8_0,llama.cpp Q4_0"
    )
    ap.add_argument("--llama-python", default="/tmp/llama-venv/bin/python")
    g = ap.parse_args()
    from shapes import checkpoint

    folder = checkpoint(g.size)
    engines = []
    for name in g.engines.split(","):
        try:
            e = Remote(name, g.llama_python if name.startswith("llama") else None)
            t = e("load", folder=str(folder), threads=g.threads)
            print(
                name, e.hello, t, {k: round(v / 1e9, 2) for k, v in e("memory").items()}, flush=True
            )
            engines.append(e)
        except RuntimeError as err:
            print("skipped", name, err, flush=True)
    ours = engines[0].name
    for case in g.cases.split(","):
        batch, context, steps = CASES[case]
        rounds = g.rounds
        got = {e.name: [] for e in engines}

        def turn(e):
            if case == "context8k":
                t = e("decode", steps=steps)
            elif steps:
                e("start", batch=batch, context=context, room=steps + 8)
                t = e("decode", steps=steps)
            else:
                return context / e("start", batch=batch, context=context, room=8)
            return batch * len(t) / sum(t)

        for e in engines:  # warm
            if case == "context8k":
                print(
                    "  prefill 8k",
                    e.name,
                    round(
                        8192 / e("start", batch=1, context=context, room=steps * (rounds + 2)), 1
                    ),
                    "tok/s",
                    flush=True,
                )
            turn(e)
        for r in range(rounds):
            for e in engines if r % 2 else engines[::-1]:
                got[e.name].append(turn(e))
        print(
            f"\n{case}: batch {batch}, context {context}, tokens/s, median of {rounds} turns  load {os.getloadavg()[0]:.1f}"
        )
        for n, v in got.items():
            lo, hi = boot(got[ours], v)
            print(
                f"  {n:22s} {statistics.median(v):9.1f}  [{min(v):.1f} .. {max(v):.1f}]   {ours}/this {statistics.median(got[ours]) / statistics.median(v):.3f} [{lo:.3f} {hi:.3f}]",
                flush=True,
            )
    for e in engines:
        e.close()


main()
