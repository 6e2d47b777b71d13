"""Builds the optional extension lfm2_fast/_C.abi3.so from csrc/; the metadata is in pyproject.toml.

LFM2_FAST_BUILD_EXT=auto, the default, builds the extension if there are sources, torch and a C++
compiler. If one is missing, or the compiler fails, a message on stderr says so, and the package
installs without the extension. With 1 that is an error; 0 never builds. On x86-64, GCC 12 or newer
makes code for every instruction set. Another compiler builds in place for this machine, and wheels
for the oldest x86-64, which are slow; CFLAGS=-march=... chooses another processor.

torch is no build requirement: the extension must be built against the torch that will run it.
``pip install --no-build-isolation .`` builds against the installed one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

WANTED = os.environ.get("LFM2_FAST_BUILD_EXT", "auto")
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10 and later
# Options that make loops fast and change no result. Loops may be vectorised: by directives, and
# because no code reads errno or floating-point exceptions. Loops begin at a cache line. Otherwise
# the speed of short ones would depend on their place. The library grows by 2 percent.
LOOPS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-falign-loops=64"]


class Missing(Exception):
    """Error of a build that lacks something: sources, torch or a compiler."""


def extension() -> dict[str, Any]:
    """Return the arguments of ``setup`` that build the extension. Raises Missing."""
    sources = found("csrc/*.cpp")
    if not sources:
        raise Missing("no sources in csrc/")
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:  # OSError: torch's libraries do not load
        raise Missing(f"no torch in the build ({error}); pass --no-build-isolation") from error
    if not os.environ.get("CXX", "c++").strip():
        del os.environ["CXX"]  # torch and setuptools would call a blank name
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise Missing(f"no C++ compiler ({compiler[0]} is not on PATH)")
    # A toolkit decides, not a GPU: wheels are built on machines without one. No -gencode is passed,
    # or torch would ignore TORCH_CUDA_ARCH_LIST.
    fits = toolkit_fits(cpp_extension.CUDA_HOME, torch.version.cuda)
    cuda = found("csrc/*.cu") if fits else []
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = make(
        "lfm2_fast._C",
        sources + cuda,
        depends=found("csrc/*.h") + found("csrc/*.cuh"),
        extra_compile_args={"cxx": [*LOOPS, "-g0", TARGET], "nvcc": ["-O3", TARGET, "-DUSE_CUDA"]},
        py_limited_api=True,
    )

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            # An extension that is built in place stays on this machine.
            if lacks_clones(compiler) and not told_instructions():
                if self.inplace:
                    module.extra_compile_args["cxx"].append("-march=native")
                say_of_one_machine(compiler[0], bool(self.inplace))
            super().run()

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if WANTED == "1":
                    raise
                # The library of an earlier build would be installed, or loaded, instead.
                for folder in (self.build_lib, "."):
                    for left in Path(folder, "lfm2_fast").glob("_C*.so"):
                        left.unlink()
                self.extensions = []
                without(f"the build failed ({error}); LFM2_FAST_BUILD_EXT=1 makes that an error")

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def lacks_clones(compiler: list[str]) -> bool:
    """Return True if ``compiler`` builds for only one kind of x86-64 (csrc/cpu_features.h)."""
    ask = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    output = subprocess.run(ask, text=True, capture_output=True).stdout
    known = dict(re.findall(r"^#define (\w+) (\d+)$", output, re.MULTILINE))
    old = "__clang__" in known or int(known.get("__GNUC__", 0)) < 12
    return "__x86_64__" in known and old


def told_instructions() -> bool:
    flags = " ".join(os.environ.get(name, "") for name in ("CFLAGS", "CPPFLAGS", "CXXFLAGS"))
    return any(flag.startswith("-march=") for flag in shlex.split(flags))


def say_of_one_machine(compiler: str, here: bool) -> None:
    advice = "CXX=g++-12, or newer, makes it fast on every machine"
    what = "this machine alone (-march=native)" if here else "the oldest x86-64, and is slow"
    print(
        f"lfm2_fast: {compiler} is not GCC 12 or newer: the extension is built for {what}; "
        f"{advice}{'' if here else ', CFLAGS=-march=native on this one'}",
        file=sys.stderr,
    )


def toolkit_fits(home: str | None, wanted: str | None) -> bool:
    """Return True if ``home`` has a CUDA toolkit of the ``wanted`` major version, torch's."""
    if home is None or wanted is None:
        return False
    nvcc = Path(home, "bin", "nvcc")
    if shutil.which(nvcc) is None:  # only libraries, without a compiler
        return False
    output = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    fits = f"release {wanted.split('.')[0]}." in output
    if not fits:
        print(f"lfm2_fast: no CUDA part: {nvcc} is not of CUDA {wanted}, torch is", file=sys.stderr)
    return fits


def without(why: str) -> None:
    print(f"lfm2_fast: installing without the C++ extension: {why}", file=sys.stderr)


def found(pattern: str) -> list[str]:
    return sorted(map(str, Path().glob(pattern)))


if WANTED not in ("auto", "1", "0"):
    sys.exit(f"LFM2_FAST_BUILD_EXT must be auto, 1 or 0, not {WANTED!r}")
arguments: dict[str, Any] = {}
if WANTED != "0":
    try:
        arguments = extension()
    except Missing as missing:
        if WANTED == "1":
            sys.exit(f"LFM2_FAST_BUILD_EXT=1, but the extension cannot be built: {missing}")
        without(str(missing))
# A source tree may lack kernels/: Git holds no empty folder.
packages = [".".join(file.parent.parts) for file in sorted(Path("lfm2_fast").rglob("__init__.py"))]
packages += ["lfm2_fast.kernels"] if Path("kernels").is_dir() else []
setup(packages=packages, **arguments)
