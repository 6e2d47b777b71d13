#!/usr/bin/env bash
# The kernels' tests on this machine's GPU, under its own Python and torch, then the same under
# compute-sanitizer. What was run and on what goes to $OUT (default bench/results/) as text.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"
export PYTHONPATH=. TRITON_INTERPRET=0 HF_HUB_OFFLINE=1
kernels=(tests/test_rms_norm.py tests/test_swiglu.py tests/test_rope.py tests/test_gated_conv.py
	tests/test_qk_norm_rope.py tests/test_flash_decode.py tests/test_flash_prefill.py
	tests/test_few_tokens.py tests/test_norm_conv.py tests/test_sample.py)

report="$out/test-gpu-$(date -u +%Y%m%dT%H%M%SZ).txt"
exec > >(tee "$report") 2>&1
echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$python" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "cuda", torch.version.cuda)'

"$python" -m pytest -q -p no:cacheprovider "${kernels[@]}" tests/test_kernels_model.py tests/test_launches.py
if command -v compute-sanitizer >/dev/null; then
	for tool in memcheck racecheck; do
		compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
			-p no:cacheprovider "${kernels[@]}"
	done
else
	echo "compute-sanitizer is not on PATH: memcheck and racecheck were not run"
fi
