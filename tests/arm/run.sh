#!/bin/sh
# Cross-compiles the extension for AArch64, and runs it and the package under emulation, on Debian.
#
# `make test-arm` calls this with PYTHON, the environment's interpreter. It makes a foreign root in
# build/arm once: Debian's Python for arm64, and wheels of torch and of what the package needs.
# Debian's g++-aarch64-linux-gnu and qemu-user must be installed. Nothing here says how fast a
# processor is.
set -eu
cd "$(dirname "$0")/../.."
here=$PWD/build/arm
root=$here/root
site=$here/site
CXX=aarch64-linux-gnu-g++
for tool in $CXX qemu-aarch64; do
	command -v $tool >/dev/null || {
		echo "make test-arm needs $tool: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
		exit 1
	}
done
mkdir -p "$here/debs" "$here/objects"

# The oldest torch that the package supports: its wheel for AArch64 needs no CUDA.
if [ ! -e "$site/torch" ]; then
	dpkg --print-foreign-architectures | grep -q arm64 || {
		dpkg --add-architecture arm64
		apt-get update -qq
	}
	(
		cd "$here/debs"
		apt-get download -qq $(printf '%s:arm64 ' python3.11-minimal libpython3.11-minimal \
			libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 libgomp1 zlib1g libffi8 libexpat1 \
			libbz2-1.0 liblzma5 libssl3 libsqlite3-0 libuuid1 libcrypt1)
		for deb in *.deb; do dpkg -x "$deb" "$root"; done
	)
	grep -v '^torch==' constraints.txt >"$here/constraints.txt"
	get="$PYTHON -m pip install -q --target $site --python-version 311 --only-binary=:all:
		--platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64
		--platform manylinux2014_aarch64 -c $here/constraints.txt"
	$get --no-deps transformers torch==2.10.0
	$get filelock typing_extensions sympy networkx jinja2 fsspec numpy safetensors tokenizers \
		huggingface_hub regex pyyaml packaging rich typer tqdm pytest hypothesis jsonschema
fi

flags="-std=c++17 -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -falign-loops=64 -fPIC
	-Wall -Wextra -Werror -Wno-unused-parameter -Wno-psabi -DTORCH_TARGET_VERSION=0x020a000000000000
	-isystem $site/torch/include -isystem $site/torch/include/torch/csrc/api/include"
for source in csrc/*.cpp; do echo "$source"; done | xargs -P2 -I{} sh -c \
	"$CXX $(echo $flags) -c {} -o $here/objects/\$(basename {} .cpp).o"
rm -rf "$here/package"
mkdir "$here/package"
cp -r lfm2_fast kernels tests pyproject.toml "$here/package"
rm -f "$here/package/lfm2_fast/"*.so
$CXX -shared "$here"/objects/*.o -L"$site/torch/lib" -Wl,--allow-shlib-undefined \
	-lc10 -ltorch_cpu -ltorch -o "$here/package/lfm2_fast/_C.abi3.so"

# No tensor exists on ARMv8.0, since torch 2.10's wheel needs ARMv8.1. So there, and on the others
# too, the code runs on raw pointers. What it does not call of torch stays unresolved.
$CXX $(echo $flags) -Icsrc -static -Wl,--unresolved-symbols=ignore-all tests/arm/bodies.cpp \
	"$here"/objects/dots_*.o "$here"/objects/groups_*.o -o "$here/bodies"

# bodies PROCESSOR INSTRUCTIONS: those that the code must find there
bodies() {
	echo "== $*, raw pointers"
	processor=$1
	shift
	qemu-aarch64 -cpu "$processor" "$here/bodies" "$@"
}

bodies cortex-a53
bodies a64fx
bodies cortex-a76 dot
bodies max,sve=off dot i8mm bf16
bodies max dot i8mm bf16

# run PROCESSOR ARGUMENTS: Python of the foreign root
run() {
	processor=$1
	shift
	(
		cd "$here/package"
		PYTHONPATH=$here/package:$site PYTHONHOME=$root/usr OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
			qemu-aarch64 -cpu "$processor" -L "$root" "$root/usr/bin/python3.11" "$@"
	)
}

# Hypothesis's own profile "ci" forgives an emulation that is slow.
check() {
	echo "== $1"
	processor=$1
	shift
	run $processor -m pytest -q -p no:cacheprovider --hypothesis-profile=ci "$@"
}

# ARMv8.2 without SDOT; SDOT; SMMLA and BFDOT beside it; SVE too.
for processor in a64fx cortex-a76 max,sve=off max; do
	check $processor tests/arm tests/csrc/test_linear.py tests/csrc/test_groups.py \
		tests/csrc/test_low_rank.py tests/csrc/test_cpu.py tests/csrc/test_sampling.py
done
# Attention of prompts is the same code on all of them, and takes as long as the rest.
check a64fx tests/csrc/test_flash_prefill.py
