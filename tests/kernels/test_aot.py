"""The kernels compile for GPUs that are not here, and do not spill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Python in another process, where Triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def aot(*args: str) -> subprocess.CompletedProcess[str]:
    return run("bench/gpu/aot.py", "--arch", "90", "--dtype", "bfloat16", *args)


def check_all_compile(compiled: dict[str, Any]) -> None:
    """None spills, and none of kernels/ was left out."""
    assert not compiled["refused"], compiled["table"] + compiled["refused"]
    names = {line.split()[0] for line in compiled["table"].splitlines()}
    for file in (ROOT / "kernels").glob("*.py"):
        for name in re.findall(r"^def _(\w+)_kernel\(", file.read_text(encoding="utf-8"), re.M):
            assert name in names, f"bench/gpu/aot.py does not compile {name}"


def test_every_kernel_compiles_for_hopper_without_a_spill(compiled) -> None:
    check_all_compile(compiled)


@pytest.mark.nightly
def test_every_size_does() -> None:
    done = aot()
    check_all_compile({"table": done.stdout, "refused": done.stderr * done.returncode})


@pytest.mark.nightly
def test_cached_kernels_are_assembled_for_blackwell() -> None:
    """By the assembler that Triton takes for it: the other one does not know all instructions."""
    given = ("--arch", "120", "--only", "norm_linear", "--size", "350M", "--cached")
    tables = [aot(*given) for _ in range(2)]
    # The second time all of them are in Triton's cache.
    first, second = (done.stdout.count("\nnorm_linear ") for done in tables)
    assert first == second > 0, tables[1].stderr


def test_a_spill_is_seen(compiled) -> None:
    assert "spill registers" in compiled["spilled"]


def test_a_new_length_compiles_nothing(compiled) -> None:
    """A user waits for the compiler once, not again at every new number of tokens or pages."""
    launched, kernels = zip(*compiled["lengths"], strict=True)
    assert len(set(launched)) == 4 and len(set(kernels)) == 1, compiled["lengths"]


# The kernels of a captured step of few tokens: those that load much before they wait, and how many
# matrices each multiplies; those that load a little; and the rest.
TILES = {"norm_linear": 1, "linear_add": 1, "norm_swiglu": 2, "norm_conv": 3, "head_argmax": 1}
LITTLE = {"flash_decode"}
CHAIN = {
    *TILES, *LITTLE, "embed_rope", "argmax_advance", "sample_scores", "sample_cut", "sample_draw",
    "sample_last", "advance", "low_rank_down", "low_rank_up",
}  # fmt: skip
# Those of few tokens that stand for all of them, launched plainly.
PLAIN = {"norm_linear", "embed_rope", "argmax_advance"}
# What these read that no step writes.
CONSTANT = {"words_ptr", "scale_ptr", "taps_ptr", "q_weight_ptr", "k_weight_ptr"}
# Cycles in which an H200 brings 32 kB to each processor: 1.0 us, at 4.3 TB/s and 1.9 GHz.
MEMORY_CYCLES = 1900


# Loads of words and scales in int4, by the rows of a thread.
INT4_LOADS = {
    4: ("LDG.E.EF.128", "LDG.E.EF.64"),
    2: ("LDG.E.EF.64", "LDG.E.EF"),
    1: ("LDG.E.EF", "LDG.E.EF.U16"),
}
# How much longer than the memory may be taken, by bits. In int4 the same bytes are twice the
# numbers, and each is scaled. The smallest size takes most, because its rows are short.
LONGER = {16: 1.0, 8: 1.0, 4: 2.6}


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.nightly)])
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Results of one process that compiled for sm_90. It is shared, as the compiler is slow.

    It has the ``table`` of the smallest size; the reasons if it was ``refused``, or if a kernel
    ``spilled``. ``lengths`` has the numbers of launches and kernels after several lengths.
    ``chain`` has every kernel of a captured step, of one size or all, int8 and int4. Each one has a
    ``name``, its arguments, ``ptx`` and ``sass``, and is marked if it is a ``dependent`` launch.
    ``sass`` is None without a disassembler. ``adapted`` are kernels that add an adapter's change.

    ``few`` leaves out biases, choices of tokens that need fewer kernels, the larger vocabulary and
    the other sizes. Kernels that are in Triton's cache, by their source and options, are only
    assembled again. Of kernels that load no weights early it disassembles nothing, and few are
    compiled for launches that are not dependent. ``early`` and ``plain`` name the kernels
    that were disassembled, and that were compiled again.
    """
    code = """
import contextlib, functools, io, json, shutil, sys
sys.path.insert(0, "bench/gpu")
import aot, torch, triton
few, early, chain, plain = (json.loads(argument) for argument in sys.argv[1:])

def launch_size(size, dtype, *, pdl):
    aot.launch_all(size, dtype, pdl=pdl)
    aot.launch_few(size, dtype, pdl=pdl)
    for bits in (8, 4):
        aot.launch_few(size, dtype, bits=bits, pdl=pdl)
    aot.launch_adapted(size, dtype, pdl=pdl)

if few:
    aot.VOCABULARIES, aot.launch_size = aot.VOCABULARIES[:1], launch_size
    aot.launch_sample = functools.partial(aot.launch_sample, most=True)

def told(*options):
    sys.argv[1:] = ["--arch", "90", "--dtype", "bfloat16", "--size", "350M", *options]
    with contextlib.redirect_stdout(io.StringIO()) as table:
        try:
            aot.main()
        except SystemExit as error:
            return table.getvalue(), str(error)
    return table.getvalue(), ""

table, refused = told(*["--cached"] * few)
_, spilled = told("--only", "gated_conv", "--maxnreg", "24")
lengths = []
with aot.compiling(90, recompile=False) as launches:
    for sequences, tokens, page_size in ((2, 6, 64), (1, 1, 16), (16, 16, 128), (3, 48, 80)):
        aot.launch_all(aot.SIZES[0], torch.bfloat16, sequences=sequences, tokens=tokens,
                       page_size=page_size, pdl=True)
        aot.launch_few(aot.SIZES[0], torch.bfloat16, tokens=sequences, pdl=True)
        lengths.append((len(launches), len({kernel.hash for _, kernel, _ in launches})))
tools = triton.knobs.nvidia
disassembles = all(shutil.which(tool.path) for tool in (tools.cuobjdump, tools.nvdisasm))
found = []
dependent = ((0, 16), (0, 8), (0, 4))
if not few:
    dependent = (*((place, bits) for place in range(4) for bits in (16, 8)), (2, 4))
for pdl, sizes, names in ((True, dependent, chain), (False, ((0, 16),), plain)):
    for place, bits in sizes:
        with aot.compiling(90, names, recompile=False) as launches:
            aot.launch_few(aot.SIZES[place], torch.bfloat16, bits=bits, pdl=pdl)
            if place == 0 and bits == 16 and not (few and not pdl):
                aot.launch_all(aot.SIZES[place], torch.bfloat16, pdl=pdl)
                aot.launch_sample(aot.VOCABULARIES[0], torch.bfloat16, pdl=pdl, most=True)
        for name, kernel, _ in launches:
            source = kernel.src
            arguments = source.fn.arg_names
            found.append({
                "name": name,
                "case": f"{name} {aot.SIZES[place].name} bits={bits}",
                "bits": bits,
                "dependent": kernel.metadata.launch_pdl,
                "constants": {arguments[at[0]]: value for at, value in source.constants.items()},
                "parameters": [each for each in arguments if source.signature[each] != "constexpr"],
                "ptx": kernel.asm["ptx"],
                "sass": kernel.asm["sass"] if pdl and disassembles and name in early else None,
            })
def parameters(source):
    for name in source.fn.arg_names:
        kind = source.signature[name]
        # Tensors of an adapter's change come before numbers of its parts.
        for number, each in enumerate(kind if isinstance(kind, tuple) else (kind,)):
            if each != "constexpr":
                yield f"{name}_{number}_ptr" if isinstance(kind, tuple) else name

with aot.compiling(90, recompile=False) as launches:
    aot.launch_adapted(aot.SIZES[0], torch.bfloat16, pdl=True)
adapted = [{"name": name, "ptx": kernel.asm["ptx"], "parameters": list(parameters(kernel.src))}
           for name, kernel, _ in launches]
print(json.dumps({"table": table, "refused": refused, "spilled": spilled, "lengths": lengths,
                  "chain": found, "adapted": adapted, "disassembles": disassembles}))
"""
    few = request.param == "few"
    early = {*TILES, *LITTLE} if few else CHAIN
    plain = PLAIN if few else CHAIN
    given = (json.dumps(each) for each in (few, sorted(early), sorted(CHAIN), sorted(plain)))
    done = run("-c", code, *given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"plain": plain, "early": early}


def above_wait(ptx: str) -> list[str]:
    """The instructions of a kernel's PTX up to its one wait."""
    body = re.sub(r"//.*", "", ptx[ptx.index(".entry") :])
    lines = [line.strip().rstrip(";") for line in body.splitlines() if line.strip()]
    assert (
        lines.count("griddepcontrol.wait") == lines.count("griddepcontrol.launch_dependents") == 1
    )
    return lines[lines.index("{") + 1 : lines.index("griddepcontrol.wait")]


def loaded_from(instructions: list[str], parameters: list[str]) -> set[str]:
    """The pointers among a kernel's parameters that the addresses of loads are made of.

    Instructions in sequence, without a branch.
    """
    origins: dict[str, set[str]] = {}
    loaded: set[str] = set()
    for line in instructions:
        operation, _, operands = re.sub(r"^@!?%p\d+\s+", "", line).partition(" ")
        made, _, of = operands.strip().partition("}" if operands.strip().startswith("{") else ",")
        places = [int(place) for place in re.findall(r"_param_(\d+)", of)]
        source = {parameters[place] for place in places if place < len(parameters)}
        source = source.union(*(origins.get(each, set()) for each in re.findall(r"%\w+", of)))
        pointers = {name for name in source if name.endswith("_ptr")}
        if operation.startswith("ld.global"):
            assert pointers, line
            loaded |= pointers
        for register in re.findall(r"%\w+", made):
            origins[register] = origins.get(register, set()) | source
    return loaded


def test_links_of_a_captured_step_wait_before_they_touch_the_chain(compiled) -> None:
    """Each once, before it branches, ends or stores, and above that only loads what no step writes.

    Not launched as dependents, they do not wait.
    """
    chain = compiled["chain"]
    assert {kernel["name"] for kernel in chain if kernel["dependent"]} == CHAIN
    assert {kernel["name"] for kernel in chain if not kernel["dependent"]} == compiled["plain"]
    early: dict[str, set[str]] = {}
    for kernel in chain:
        name, case = kernel["name"], kernel["case"]
        if not kernel["dependent"]:
            assert "griddepcontrol" not in kernel["ptx"], case
            continue
        above = above_wait(kernel["ptx"])
        assert "griddepcontrol.launch_dependents" in above, case
        for line in above:
            operation = re.sub(r"^@!?%p\d+\s+", "", line).split()[0]
            assert not re.match(r"(st|atom|red|bra|ret|exit|call|cp|bar)\b", operation), line
            assert not line.startswith("$L__BB"), line
        loaded = loaded_from(above, kernel["parameters"])
        assert loaded <= CONSTANT, (case, loaded)
        early.setdefault(name, set()).update(loaded)
    # And what can be early is.
    assert {name for name, loaded in early.items() if loaded} == {*TILES, *LITTLE}
    assert set().union(*early.values()) == CONSTANT


def test_adapters_are_read_after_the_wait(compiled) -> None:
    """Other requests' steps may still run while adapters come and go: only weights are early."""
    found = compiled["adapted"]
    assert {kernel["name"] for kernel in found} == {*TILES} - {"head_argmax"}
    for kernel in found:
        assert any(name.startswith("change_") for name in kernel["parameters"])
        loaded = loaded_from(above_wait(kernel["ptx"]), kernel["parameters"])
        assert loaded and loaded <= CONSTANT, kernel["name"]


def test_weights_are_in_flight_before_the_wait(compiled) -> None:
    """In the machine code a load has 16 bytes a thread, and the first tile is above the wait.

    The loop has as many loads for the next tiles, and the assembler moved none of them up.
    """
    if not compiled["disassembles"]:
        pytest.skip("the disassembler that triton brings is not there")
    found = [kernel for kernel in compiled["chain"] if kernel["sass"] is not None]
    assert {kernel["name"] for kernel in found} == compiled["early"]
    for kernel in found:
        name, case, named = kernel["name"], kernel["case"], kernel["constants"]
        lines = kernel["sass"].splitlines()
        looked = (re.search(r"(LDG|STG|ATOMG|REDG|ACQBULK|PREEXIT)[.\w]*", line) for line in lines)
        marks = [mark[0] for mark in looked if mark]
        assert marks.count("ACQBULK") == marks.count("PREEXIT") == 1, case
        wait = marks.index("ACQBULK")
        above, below = marks[:wait], marks[wait:]
        assert any(mark.startswith("LDG") for mark in below), case
        above.remove("PREEXIT")
        if name not in TILES:
            loads = sum("ld.global" in line for line in above_wait(kernel["ptx"]))
            assert len(above) == loads and all(mark.startswith("LDG") for mark in above), case
            continue
        if named["K"] % named["BLOCK_K"]:
            # Loads beyond the last column are left out.
            continue
        warps = named["WARPS"]
        parts = 4 if TILES[name] == 3 else TILES[name]
        rows = parts * named["BLOCK_N"]
        tile = rows * named["BLOCK_K"] * named["BITS"] // 8
        width, scales = "LDG.E.EF.128", ""
        if named["BITS"] == 4:
            # A thread has a word of each of four, two or one row, and their scales.
            width, scales = INT4_LOADS[min(rows // 8, 4)]
        loads = tile // ({"128": 16, "64": 8}.get(width[-3:].strip("."), 4) * 32 * warps)
        lines = kernel["sass"].splitlines()
        products = loops_of(lines, "HMMA")
        nested = [each for each in products if any(other.holds(each) for other in products)]
        # The compiler may have written three steps one after another.
        steps = -(-named["K"] // named["BLOCK_K"])
        written = steps if steps == 3 and not nested else 1
        for streamed in filter(None, (width, scales)):
            assert above.count(streamed) == loads * named["DEPTH"], (case, above)
            assert below.count(streamed) == loads * written, (case, below)
        # The other loads are the taps: three for each channel, at odd addresses.
        rest = [mark for mark in above if mark not in (width, scales)]
        assert all(".U16" in mark for mark in rest), (case, rest)
        assert len(rest) <= named["BLOCK_N"] * (name == "norm_conv") * 4
        # Tile and tokens become operands as they were loaded: a step through K exchanges nothing.
        for inner in nested:
            text = "\n".join(lines[inner.first : inner.last])
            assert not re.findall(r"\b(?:SHFL|STS|LDS|LDSM|BAR)\b", text), case


@dataclass(frozen=True)
class Loop:
    """Lines ``first`` to ``last`` of a kernel's machine code, which branch back."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self.first <= other.first and other.last <= self.last and self != other


def loops_of(lines: list[str], what: str = "") -> list[Loop]:
    """The loops of machine code, but for the one behind its end; those that have ``what``."""
    labels = {line.strip().rstrip(":"): at for at, line in enumerate(lines) if "LBB" in line[:6]}
    found = []
    for at, line in enumerate(lines):
        target = re.search(r"BRA (LBB\d+)", line)
        if target and labels[target[1]] < at - 1:
            found.append(Loop(labels[target[1]], at))
    return [each for each in found if any(what in line for line in lines[each.first : each.last])]


def issue_cycles(kernel: dict[str, Any], tokens: int) -> tuple[float, float]:
    """Cycles in which one of a processor's four schedulers issues what 32 kB of a weight need.

    The second number adds all that a kernel does once for its tokens. Instructions are counted, one
    a cycle, so it is a lower bound of the time.
    """
    lines, named = kernel["sass"].splitlines(), kernel["constants"]
    code = [bool(re.search(r"\t[@!A-Z]", line)) for line in lines]
    loops, products = loops_of(lines), loops_of(lines, "HMMA")
    row = max(products, key=lambda each: each.last - each.first)
    inner = [each for each in products if row.holds(each)]
    squares = [each for each in loops if each.last < row.first]

    def count(loop: Loop) -> int:
        return sum(code[loop.first : loop.last + 1])

    steps = -(-named["K"] // named["BLOCK_K"])
    # The compiler may have written three steps one after another.
    assert len(inner) == (steps > 1) or steps == 3
    assert len(squares) <= 1
    per_row = count(row) + sum((steps - 1) * count(each) for each in inner)
    tile = TILES[kernel["name"]] * named["BLOCK_N"] * named["K"] * named["BITS"] / 8
    round_of_32kb = per_row * named["WARPS"] / 4 * 32768 / tile
    once = sum(code[: row.first]) - sum(map(count, squares))
    once += sum(count(each) for each in squares) * -(-tokens // 8)
    return round_of_32kb, round_of_32kb + once * 8 / 4


def test_sixteen_tokens_take_hardly_longer_than_one(compiled) -> None:
    """To issue what 32 kB of a weight need takes less time than memory takes to bring them.

    With what is done once, sixteen tokens issue at most 1.3 times what one does.
    """
    if not compiled["disassembles"]:
        pytest.skip("the disassembler that triton brings is not there")
    found = [kernel for kernel in compiled["chain"] if kernel["sass"] and kernel["name"] in TILES]
    assert {(kernel["name"], kernel["bits"]) for kernel in found} == {
        (name, bits) for name in TILES for bits in LONGER
    }
    for kernel in found:
        one, sixteen = issue_cycles(kernel, 1), issue_cycles(kernel, 16)
        most = MEMORY_CYCLES * LONGER[kernel["bits"]]
        assert sixteen[0] == one[0] < most, (kernel["case"], one)
        assert sixteen[1] <= 1.3 * one[1], (kernel["case"], one, sixteen)
