"""Wheel, sdist, installed package and bare checkout: each holds what it should, and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import lfm2_fast

ROOT = Path(__file__).resolve().parents[2]

GENERATE = """
import torch, lfm2_fast
from pathlib import Path
from transformers import Lfm2ForCausalLM
from lfm2_fast.kernels.probe import FOUND
model = lfm2_fast.load(Path(lfm2_fast.__file__).parent / "tiny", device="cpu")
assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape[1] > 3
print(lfm2_fast.__file__)
"""


def run(*command: str | Path, cwd: Path, **env: str | Path) -> str:
    """Return the output of ``command``, which must succeed."""
    environment = {**os.environ, **{name: str(value) for name, value in env.items()}}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """The pure "wheel" or the "sdist" of ``source``, made in the empty folder ``out``."""
    command = (sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out)
    run(*command, cwd=source, LFM2_FAST_BUILD_EXT="0")
    (made,) = out.iterdir()
    return made


def compiler_that(does: str, path: Path) -> Path:
    """A program that prints a compiler's version if asked, else runs the script and fails."""
    version = 'case "$1" in -*version) echo "c++ (GCC) 13.2.0"; exit;; esac'
    path.write_text(f"#!/bin/sh\n{version}\n{does}\nexit 1\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def set_up(checkout: Path, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py with the tools of this interpreter's environment."""
    environment = {**os.environ, **env}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    whole = [sys.executable, "setup.py", "-q", *command]
    return subprocess.run(whole, cwd=checkout, env=environment, text=True, capture_output=True)


def checksums(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout with one more kernel and C++ source, and an extension left behind."""
    copy = tmp_path_factory.mktemp("checkout") / "lfm2_fast"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    for added in ("kernels/probe.py", "csrc/probe.cpp", "lfm2_fast/_C.abi3.so"):
        (copy / added).parent.mkdir(exist_ok=True)
        (copy / added).touch()
    (copy / "kernels" / "probe.py").write_text("FOUND = True\n", encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, its dependencies being those of this interpreter."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_holds_the_package_and_nothing_else(checkout: Path, wheel: Path) -> None:
    package = {
        file.relative_to(checkout).as_posix()
        for file in (checkout / "lfm2_fast").rglob("*")
        if file.is_file() and file.suffix not in (".so", ".pyc")
    }
    kernels = {f"lfm2_fast/kernels/{file.name}" for file in (checkout / "kernels").iterdir()}
    assert {"lfm2_fast/py.typed", "lfm2_fast/tiny/model.safetensors"} <= package
    assert not (checkout / "kernels" / "__init__.py").exists()
    assert wheel.name == f"lfm2_fast-{lfm2_fast.__version__}-py3-none-any.whl"
    assert {name for name in checksums(wheel) if ".dist-info/" not in name} == package | kernels


def test_sdist_holds_the_sources_and_builds_the_same_wheel(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(build("sdist", checkout, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"lfm2_fast-{lfm2_fast.__version__}"
    for name in ("LICENSE", "Makefile", "constraints.txt", "csrc/probe.cpp", "tests/conftest.py"):
        assert (source / name).is_file(), name
    assert not list(source.rglob("*.so"))
    assert checksums(build("wheel", source, tmp_path / "wheel")) == checksums(wheel)


def test_installed_wheel_generates(site: Path, tmp_path: Path) -> None:
    printed = run(sys.executable, "-c", GENERATE, cwd=tmp_path, PYTHONPATH=site)
    assert Path(printed.strip()) == site / "lfm2_fast" / "__init__.py"


def test_installed_command_writes_text(site: Path, tmp_path: Path) -> None:
    command = (site / "bin" / "lfm2-fast", "demo", "--max-new-tokens", "8")
    assert run(*command, cwd=tmp_path, PYTHONPATH=site).strip()


def test_bare_checkout_generates(checkout: Path) -> None:
    printed = run(sys.executable, "-c", GENERATE, cwd=checkout, PYTHONPATH=".")
    assert Path(printed.strip()).resolve() == checkout / "lfm2_fast" / "__init__.py"


def test_kernels_folder_does_not_shadow_the_package_kernels(checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    spec = PathFinder.find_spec("kernels", [str(checkout), str(tmp_path)])
    assert spec is not None
    assert spec.origin == str(package)


@pytest.mark.parametrize(
    ("wanted", "lacking", "code", "said"),
    [
        pytest.param("auto", "compiler", 0, "no C++ compiler", id="auto-no-compiler"),
        pytest.param("auto", "torch", 0, "no torch", id="auto-no-torch"),
        pytest.param("auto", "libraries", 0, "no torch", id="auto-broken-torch"),
        pytest.param(
            "1",
            "compiler",
            1,
            "no C++ compiler",
            id="insist-no-compiler",
            marks=pytest.mark.nightly,
        ),
        pytest.param("1", "torch", 1, "no torch", id="insist-no-torch"),
        pytest.param("0", "compiler", 0, "", id="skip"),
        pytest.param("yes", "compiler", 1, "must be auto, 1 or 0", id="nonsense"),
    ],
)
def test_setup_says_why_it_does_not_build(
    checkout: Path, tmp_path: Path, wanted: str, lacking: str, code: int, said: str
) -> None:
    error = "OSError" if lacking == "libraries" else "ImportError"
    (tmp_path / "torch.py").write_text(f"raise {error}('not here')\n", encoding="utf-8")
    env = {**os.environ, "LFM2_FAST_BUILD_EXT": wanted, "CXX": "no-such-compiler"}
    if lacking != "compiler":
        env["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=checkout, env=env, text=True, capture_output=True)
    assert done.returncode == code
    assert done.stdout.strip() == (lfm2_fast.__version__ if code == 0 else "")
    assert said in done.stderr if said else not done.stderr


@pytest.mark.parametrize("name", [pytest.param("", marks=pytest.mark.nightly), " "])
def test_setup_needs_no_name_of_a_compiler_and_no_nvcc(
    checkout: Path, tmp_path: Path, name: str
) -> None:
    """CXX may be set to nothing, and CUDA's home may hold libraries alone."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.utils.cpp_extension\ntorch.version.cuda = '13.0'\n"
        f"torch.utils.cpp_extension.CUDA_HOME = {str(tmp_path)!r}\n",
        encoding="utf-8",
    )
    asked = tmp_path / "asked"
    compiler_that(f'echo "$@" >>{asked}', tmp_path / "c++")
    env = {"LFM2_FAST_BUILD_EXT": "auto", "CXX": name, "PYTHONPATH": str(tmp_path)}
    env["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = set_up(checkout, "build_ext", "--inplace", "--build-temp", tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "/csrc/" in asked.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("place", "flags", "native", "said"),
    [
        pytest.param("--inplace", "", True, "for this machine alone", id="here"),
        pytest.param("--force", "", False, "for the oldest x86-64", id="elsewhere"),
        pytest.param(
            "--inplace", "-march=haswell", False, "", id="told", marks=pytest.mark.nightly
        ),
    ],
)
def test_setup_says_what_an_old_compiler_builds_for(
    checkout: Path, tmp_path: Path, place: str, flags: str, native: bool, said: str
) -> None:
    """GCC 11 makes no clones: what stays here is for this machine, what may leave for any."""
    asked = tmp_path / "asked"
    defines = "#define __GNUC__ 11\\n#define __x86_64__ 1\\n"
    does = f'case "$1" in -dM) printf \'{defines}\'; exit;; esac\necho "$@" >>{asked}'
    compiler = compiler_that(does, tmp_path / "old-c++")
    env = {"CXX": str(compiler), "CFLAGS": flags, "LFM2_FAST_BUILD_EXT": "auto"}
    done = set_up(checkout, "build_ext", place, "--build-temp", tmp_path, **env)
    assert done.returncode == 0
    given = asked.read_text(encoding="utf-8")
    assert ("-march=native" in given) == native and flags in given
    assert said in done.stderr and ("not GCC 12" in done.stderr) == bool(said)


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_setup_goes_on_where_the_compiler_fails(
    checkout: Path, tmp_path: Path, wanted: str
) -> None:
    """Unless the extension was insisted on; in both cases it says so, once."""
    compiler = compiler_that("echo this compiler is broken >&2", tmp_path / "broken-c++")
    earlier = [folder / "lfm2_fast" / "_C.abi3.so" for folder in (tmp_path / "lib", checkout)]
    for left in earlier:
        left.parent.mkdir(parents=True, exist_ok=True)
        left.touch()
    places = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    env = {"LFM2_FAST_BUILD_EXT": wanted, "CXX": str(compiler)}
    done = set_up(checkout, "build", *places, **env)
    assert "this compiler is broken" in done.stdout + done.stderr
    assert (done.returncode == 0) == (wanted == "auto")
    warned = "installing without the C++ extension: the build failed"
    assert done.stderr.count(warned) == (wanted == "auto")
    if wanted == "auto":
        assert "LFM2_FAST_BUILD_EXT=1" in done.stderr
        assert (tmp_path / "lib" / "lfm2_fast" / "config.py").is_file()
        assert not any(left.exists() for left in earlier), "an earlier build would be taken for it"
