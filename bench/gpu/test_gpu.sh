#!/usr/bin/env bash
# The kernels' tests on this machine's GPU, under its own Python and torch, then some of the same
# under compute-sanitizer: within ten minutes, each part whatever became of the one before. What was
# run and on what goes to $OUT (default bench/results/) as text; the exit status is that of the worst.
# $LFM2_FAST_COMMIT says what is tested, where there is no .git.
set -uo pipefail
SECONDS=0
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"
export PYTHONPATH=. TRITON_INTERPRET=0 HF_HUB_OFFLINE=1
# Where CUDA's tools lie, if they are not on PATH.
PATH+=:${CUDA_HOME:-/usr/local/cuda}/bin
kernels=(tests/kernels/test_rms_norm.py tests/kernels/test_swiglu.py tests/kernels/test_rope.py tests/kernels/test_gated_conv.py
	tests/kernels/test_qk_norm_rope.py tests/kernels/test_flash_decode.py tests/kernels/test_flash_prefill.py
	tests/kernels/test_few_tokens.py tests/kernels/test_norm_conv.py tests/kernels/test_sample.py)
models=(tests/ops/test_triton_ops.py tests/kernels/test_pdl.py tests/engine/test_decode.py)

report="$out/test-gpu-$(date -u +%Y%m%dT%H%M%SZ).txt"
exec > >(tee "$report") 2>&1
echo "commit ${LFM2_FAST_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$python" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "cuda", torch.version.cuda)'

has() { "$python" -c "import $1" 2>/dev/null; }
# Most of the time goes to compiling, one variant after another: processes share it out.
together=()
has xdist && together+=(-n 12)
has pytest_timeout && together+=(--timeout=200)
worst=0

# What it is called, the seconds it may take, and the command. At the limit it is interrupted, upon
# which pytest tells what has failed so far, even if whoever started this ignores interrupts.
part() {
	local name=$1 seconds=$2 status=0
	shift 2
	echo "== $name, $seconds s at most"
	timeout -s INT -k 15 "$seconds" env --default-signal=INT "$@" || status=$?
	echo "== $name: exit status $status"
	((status > worst)) && worst=$status
	return 0
}
tests() { echo "$python" -m pytest -q -p no:cacheprovider; }

# Of the seconds since this began, what one part leaves is the next one's.
end=580
part tests 310 $(tests) "${together[@]}" -k "not beyond_32" "${kernels[@]}" "${models[@]}"
# Each holds some 20 GB of pages.
part "far pages" 60 $(tests) -k beyond_32 "${kernels[@]}"
if command -v compute-sanitizer >/dev/null; then
	# Without torch's caching allocator, whose segments hide what goes beyond a tensor.
	export PYTORCH_NO_CUDA_MEMORY_CACHING=1
	part memcheck $((end - 80 - SECONDS)) \
		compute-sanitizer --tool memcheck --error-exitcode 9 --report-api-errors no \
		$(tests) -k "not any_batch and not beyond_32" \
		tests/kernels/test_flash_decode.py tests/kernels/test_few_tokens.py tests/kernels/test_norm_conv.py tests/kernels/test_qk_norm_rope.py
	# It looks at shared memory alone, which Triton lays out: the kernel with barriers of its own.
	part racecheck $((end - SECONDS)) \
		compute-sanitizer --tool racecheck --error-exitcode 9 --report-api-errors no \
		$(tests) -k "not any_batch and not beyond_32" tests/kernels/test_flash_decode.py
else
	echo "compute-sanitizer was not found: memcheck and racecheck were not run"
fi
exit "$worst"
