"""Building llama.cpp: the commands, the stamp, and errors that name a remedy."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from bench.cpu import llama_build
from bench.cpu.llama_build import PROGRAMS, BuildError

PYTHON = sys.executable
# Configures by writing down its options, and builds by making what it is asked for.
CMAKE = """#!{python}
import sys
from pathlib import Path

here = Path(__file__)
with open(here.with_name("asked"), "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "--build":
    {body}
    made = Path(sys.argv[2]) / "bin"
    made.mkdir(parents=True)
    for name in sys.argv[4:]:
        (made / name).write_text("a program")
"""


def sdist(folder: Path, *names: str) -> Path:
    """Write an archive that holds files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "llama_cpp_python-1.2.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            member = tarfile.TarInfo(f"llama_cpp_python-1.2/{name}")
            member.size = len(name)
            file.addfile(member, io.BytesIO(name.encode()))
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tools that is the whole of PATH, in a project of its own."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("cc", "c++", "ninja", "python"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("gguf==7\nllama-cpp-python==1.2\n")
    monkeypatch.setattr(llama_build, "CONSTRAINTS", constraints)
    monkeypatch.setattr(llama_build, "PEERS", tmp_path / "peers")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def cmake(tools: Path, body: str = "pass") -> None:
    (tools / "cmake").write_text(CMAKE.format(python=PYTHON, body=body))
    (tools / "cmake").chmod(0o755)


def test_it_is_built_once(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cmake(tools)
    fetched: list[Path] = []

    def download(folder: Path) -> Path:
        fetched.append(folder)
        names = ("vendor/llama.cpp/CMakeLists.txt", "vendor/llama.cpp/convert_hf_to_gguf.py")
        return sdist(folder, *names, "vendor/other/x", "setup.py")

    monkeypatch.setattr(llama_build, "download", download)
    assert llama_build.main() == 0
    peers = llama_build.PEERS
    assert {path.name for path in (peers / "bin").iterdir()} == set(PROGRAMS)
    assert (peers / llama_build.CONVERTER).is_file()
    assert not list(peers.rglob("setup.py")) and not (peers / "other").exists()
    configure, build = (tools / "asked").read_text().splitlines()
    assert f"-S {peers / 'llama.cpp'} -B {peers / 'cmake'} -G Ninja" in configure
    assert f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}" in configure
    assert "-DGGML_NATIVE=ON" in configure and "COMMIT=llama-cpp-python-1.2" in configure
    assert build == f"--build {peers / 'cmake'} --target {' '.join(PROGRAMS)}"
    told = capsys.readouterr().out
    assert "[4 of 4] compile" in told and "convert_hf_to_gguf.py" in told

    assert llama_build.main() == 0
    assert len(fetched) == 1 and "are built" in capsys.readouterr().out
    (peers / "bin" / "llama-bench").unlink()
    assert not llama_build.built()
    (peers / "bin" / "llama-bench").touch()
    assert llama_build.built()
    llama_build.CONSTRAINTS.write_text("llama-cpp-python==1.3\n")
    assert not llama_build.built()


def test_a_build_that_fails_leaves_no_stamp(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cmake(tools, "sys.exit(3)")
    source = "vendor/llama.cpp/CMakeLists.txt"
    monkeypatch.setattr(llama_build, "download", lambda folder: sdist(folder, source))
    assert llama_build.main() == 1
    told = capsys.readouterr().err
    assert "does not compile" in told and "GCC 9" in told and "exit code 3" in told
    assert not llama_build.built()


def test_a_missing_compiler_is_named(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_build.check_compiler()
    (tools / "c++").unlink()
    assert llama_build.main() == 1 and not llama_build.PEERS.exists()
    assert "is not built: no compiler c++" in capsys.readouterr().err
    with pytest.raises(BuildError, match=r"c\+\+ or g\+\+ or clang\+\+ .*apt install .*\$CXX"):
        llama_build.check_compiler()
    monkeypatch.setenv("CXX", "cc -std=c++20")
    llama_build.check_compiler()
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(BuildError, match="no compiler icpx is on PATH"):
        llama_build.check_compiler()


def test_a_missing_tool_comes_from_pip(tools: Path, tmp_path: Path) -> None:
    assert llama_build.tool("ninja") == str(tools / "ninja")
    # The fixture's python does nothing, and says that it did well.
    with pytest.raises(BuildError, match="no program cmake is in"):
        llama_build.tool("cmake")
    installs = f'#!/bin/sh\necho "$@" > {tmp_path}/pip\n/bin/cp {tools}/ninja {tools}/cmake\n'
    (tools / "python").write_text(installs)
    assert llama_build.tool("cmake") == str(tools / "cmake")
    asked = (tmp_path / "pip").read_text().strip()
    assert asked == f"-m pip install -q -c {llama_build.CONSTRAINTS} cmake"
    (tools / "cmake").unlink()
    (tools / "python").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BuildError, match="cmake is not on PATH .* install cmake yourself"):
        llama_build.tool("cmake")


def test_the_pinned_version_is_downloaded(tools: Path, tmp_path: Path) -> None:
    made, into = sdist(tmp_path / "index", "setup.py"), tmp_path / "into"
    copies = f'echo "$@" > {tmp_path}/pip; /bin/mkdir {into}; /bin/cp {made} {into}/'
    (tools / "python").write_text(f"#!/bin/sh\n{copies}\n")
    sdist(into, "old").rename(into / "llama_cpp_python-1.1.tar.gz")
    assert llama_build.download(into) == into / made.name
    asked = (tmp_path / "pip").read_text()
    assert "--no-binary llama-cpp-python" in asked and "llama-cpp-python==1.2" in asked


def test_an_archive_without_the_sources_is_refused(tmp_path: Path) -> None:
    archive = sdist(tmp_path, "setup.py")
    with pytest.raises(BuildError, match="has no vendor/llama.cpp: pin another"):
        llama_build.unpack(archive, tmp_path / "out")


def test_the_version_must_be_pinned(tools: Path) -> None:
    assert llama_build.pinned("gguf") == "7"
    with pytest.raises(BuildError, match="pins no cmake; add a line cmake==VERSION"):
        llama_build.pinned("cmake")
