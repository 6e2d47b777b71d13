"""Count the instructions of AArch64's kernels for a byte of weights, beside llama.cpp's kernels.

    python -m bench.cpu.arm_instructions

Debian's cross-compiler builds both, and QEMU runs them and logs every instruction. A kernel is
called once in one run and twice in another: the difference is a call. No time is measured, so
nothing here says how fast a processor is. ``make peers`` unpacks llama.cpp's sources.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.cpu.llama_build import PEERS
from bench.report import results
from bench.report.markdown import markdown
from bench.report.results import ROOT, Figure

CXX, CC, QEMU = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-gcc", "qemu-aarch64"
SIZE, ROWS = 1024, 16  # numbers along a row, and rows, of arm_instructions.cpp
MOST = 1.1
OURS, THEIRS = "lfm2_fast", "llama.cpp"


@dataclass(frozen=True)
class Pair:
    """Kernels of the same work: a name and the tokens, as arm_instructions.cpp knows them.

    ``arch`` is what llama.cpp is compiled for: its compiler chooses where ours chooses at run time.
    """

    what: str
    arch: str
    bits: int
    ours: str
    theirs: str

    @property
    def tokens(self) -> int:
        return int(self.ours.split()[1])

    @property
    def bytes(self) -> int:
        """Bytes of numbers that are multiplied, counted once for each token."""
        return SIZE * ROWS * self.bits // 8 * self.tokens


SDOT, SMMLA = "armv8.2-a+dotprod", "armv8.2-a+dotprod+i8mm"
PAIRS = (
    Pair("int4, 1 token, NEON", "armv8-a", 4, "groups_neon 1", "vec_dot_q4_0 1"),
    Pair("int4, 1 token, SDOT", SDOT, 4, "groups_neondot 1", "gemv_q4_0_4x4 1"),
    Pair("int4, 16 tokens, SDOT", SDOT, 4, "groups_neondot 16", "gemm_q4_0_4x4 16"),
    Pair("int4, 1 token, beside SMMLA", SMMLA, 4, "groups_neondot 1", "gemv_q4_0_4x8 1"),
    Pair("int4, 16 tokens, SMMLA", SMMLA, 4, "groups_neoni8mm 16", "gemm_q4_0_4x8 16"),
    Pair("int8, 1 token, SDOT", SDOT, 8, "dots_neondot 1", "gemv_q8_0_4x4 1"),
    Pair("int8, 16 tokens, SDOT", SDOT, 8, "dots_neondot 16", "gemm_q8_0_4x4 16"),
    Pair("int8, 1 token, beside SMMLA", SMMLA, 8, "dots_neondot 1", "gemv_q8_0_4x8 1"),
    Pair("int8, 16 tokens, SMMLA", SMMLA, 8, "dots_neoni8mm 16", "gemm_q8_0_4x8 16"),
)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")


def link(objects: list[Path], program: Path) -> Path:
    """Link a program. It may lack functions that it does not call, like llama.cpp's plain ones."""
    run(CXX, "-static", "-Wl,--unresolved-symbols=ignore-all", *objects, "-o", program)
    return program


def our_objects(folder: Path) -> list[Path]:
    """Compile our kernels and arm_instructions.cpp, with the options of setup.py."""
    made = []
    fast = ("-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
    csrc = ROOT / "csrc"
    kernels = [*csrc.glob("groups_neon*.cpp"), *csrc.glob("dots_neon*.cpp")]
    for source in (*kernels, Path(__file__).with_suffix(".cpp")):
        made.append(folder / f"{source.stem}.o")
        options = (*fast, "-falign-loops=64", "-Wno-psabi", f"-I{csrc}")
        run(CXX, *options, "-c", source, "-o", made[-1])
    return made


def our_program(folder: Path) -> Path:
    """Return a program of our kernels alone."""
    return link(our_objects(folder), folder / "kernels")


def build(folder: Path, sources: Path) -> dict[str, Path]:
    """Return a program for each of llama.cpp's builds, with all of our kernels in it."""
    ours = our_objects(folder)
    ggml = sources / "ggml"
    includes = [f"-I{ggml / each}" for each in ("include", "src", "src/ggml-cpu")]
    programs = {}
    for i, arch in enumerate(dict.fromkeys(pair.arch for pair in PAIRS)):
        theirs = []
        for compiler, name in ((CXX, "repack.cpp"), (CC, "quants.c")):
            theirs.append(folder / f"{i}-{name}.o")
            options = ("-O3", "-DNDEBUG", f"-march={arch}", *includes, "-w")
            source = ggml / "src" / "ggml-cpu" / "arch" / "arm" / name
            run(compiler, *options, "-c", source, "-o", theirs[-1])
        programs[arch] = link([*ours, *theirs], folder / f"kernels-{i}")
    return programs


def instructions(program: Path, kernel: str) -> int:
    """Return how many instructions a call of ``kernel`` runs."""
    found = []
    log = program.with_suffix(".log")
    every = ("-cpu", "max", "-singlestep", "-d", "exec,nochain", "-D", log)
    for calls in ("1", "2"):
        run(QEMU, *every, program, kernel, calls)
        with log.open("rb") as lines:
            found.append(sum(1 for _ in lines))
        log.unlink()
    return found[1] - found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, default=PEERS / "llama.cpp")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "arm-instructions.json")
    given = parser.parse_args()
    for tool in (CXX, QEMU):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is missing: apt-get install g++-aarch64-linux-gnu qemu-user")
    if not given.sources.is_dir():
        parser.error(f"{given.sources} is not a folder: make peers unpacks llama.cpp's sources")
    figures, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        programs = build(Path(folder), given.sources)
        for pair in PAIRS:
            each = []
            for engine, kernel in ((OURS, pair.ours), (THEIRS, pair.theirs)):
                each.append(instructions(programs[pair.arch], kernel) / pair.bytes)
                figures.append(Figure(pair.what, engine, "instructions/byte", each[-1:]))
            rows.append([pair.what, *(f"{value:.3f}" for value in (*each, each[0] / each[1]))])
    found = results.header(
        "instructions for a byte of weights and a token, on AArch64 under QEMU",
        {"size": SIZE, "rows": ROWS, "pairs": [vars(pair) for pair in PAIRS], "most": MOST},
    )
    compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True).stdout
    found["versions"] |= {CXX: compiler.splitlines()[0]}
    results.write(given.out, found | {"figures": results.as_json(figures)})
    print(markdown(["instructions/byte", OURS, THEIRS, "ratio"], rows))
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
