#!/usr/bin/env bash
# Tests, sanitizers and benchmarks of the CUDA backend on a machine with a Hopper GPU and PyTorch for it, each into a file:
#   tests/gpu/run.sh RESULTS [BUILD]
# BUILD (default build/cuda) is a build with tests and benchmarks. The Python package is built here.
set -uo pipefail
results=$(mkdir -p "$1" && cd "$1" && pwd)
build=${2:-build/cuda}
cd "$(dirname "$0")/../.."

run() {  # name seconds command...
  local name=$1 seconds=$2
  shift 2
  local begin=$SECONDS
  timeout "$seconds" "$@" > "$results/$name.txt" 2>&1
  local status=$?
  printf '%-10s rc %-3s %4s s  %s\n' "$name" "$status" $((SECONDS - begin)) "$(tail -n 1 "$results/$name.txt" | cut -c1-120)"
}

nvidia-smi -L
run install 150 python3 -m pip install -q --no-deps --no-build-isolation --target "$results/site" . \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real
export PYTHONPATH=$results/site${PYTHONPATH:+:$PYTHONPATH}
run pytest 180 python3 -m pytest -q -p no:cacheprovider tests/gpu
run contract 150 "$build/tests/test_cuda"
run experts 150 "$build/tests/test_experts_cuda"
run kernels 100 "$build/benchmarks/cuda_linear"
run layer 60 "$build/benchmarks/cuda_linear" --layer
run moe 200 "$build/benchmarks/cuda_experts"
run widths 100 "$build/benchmarks/cuda_linear" W4 W5 W6 W8 8192x8192 28672x4096 1 16 64 256 1024
run linear 150 python3 -m flexq bench linear --device cuda --quiet \
  --tokens 1 8 16 32 64 128 256 1024 4096
run decode 300 python3 -m flexq bench decode --quiet --side-by-side --contexts 128 \
  --contenders "flexq W6A8" "flexq W6A8 channel" bf16 W8A8 fp8
run host 30 python3 -m flexq bench host --device cuda
if python3 -c 'import vllm' 2> /dev/null; then
  run vllm 580 python3 -m pytest -q -p no:cacheprovider tests/vllm/test_fusion.py tests/vllm/test_weights.py \
    tests/vllm/test_gpu_offline.py tests/vllm/test_offline.py -k "not test_offline or damaged"
  run serve 500 python3 benchmarks/serve_gpu.py --contenders bf16 fp8 flexq-channel-head --loads 64
fi
# Some tests provoke errors of the API on purpose.
run memcheck 90 compute-sanitizer --tool memcheck --report-api-errors no "$build/tests/test_cuda" --quick
run memcheck-experts 60 compute-sanitizer --tool memcheck "$build/tests/test_experts_cuda"
run racecheck 90 compute-sanitizer --tool racecheck "$build/tests/test_cuda" --quick
