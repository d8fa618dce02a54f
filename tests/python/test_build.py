"""What the build decides about CUDA, with a make-believe nvidia-smi."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake")

pytestmark = pytest.mark.skipif(
    CMAKE is None or not (ROOT / "CMakeLists.txt").exists(), reason="needs CMake and the source tree"
)


def run_cmake(*arguments, smi: str, folder: Path) -> str:
    """Output of CMake on a PATH whose nvidia-smi is this shell script."""
    script = folder / "bin" / "nvidia-smi"
    script.parent.mkdir(exist_ok=True)
    script.write_text("#!/bin/sh\n" + smi)
    script.chmod(0o755)
    environment = {"PATH": f"{script.parent}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run([CMAKE, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("smi", "architectures"),
    [
        ("echo 9.0", "90a-real"),
        ("echo 8.9; echo 8.0; echo 8.9", "80-real;89-real"),
        ("echo 12.0", "90-virtual"),
        ("echo 7.5", ""),
        ("echo 'NVIDIA-SMI has failed' ; exit 9", ""),
        ("echo No devices were found", ""),
    ],
)
def test_gpus_here(smi, architectures, tmp_path):
    assert run_cmake("-P", str(ROOT / "cmake/FlexqGpus.cmake"), smi=smi, folder=tmp_path).strip() == architectures


def configure(smi: str, folder: Path, *options: str) -> str:
    return run_cmake(
        "-S", str(ROOT), "-B", str(folder / "build"), "-DFLEXQ_BUILD_TESTS=OFF", *options, smi=smi, folder=folder
    )


def test_auto_without_a_gpu_builds_without_cuda(tmp_path):
    output = configure("exit 9", tmp_path)
    assert "building without CUDA; FLEXQ_CUDA=ON builds it for all GPUs" in output
    assert "The CUDA compiler" not in output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_auto_builds_for_the_gpus_here(tmp_path):
    nvcc = f"-DCMAKE_CUDA_COMPILER={shutil.which('nvcc')}"
    assert "for 89-real (the GPUs here; FLEXQ_CUDA=ON builds for all)" in configure("echo 8.9", tmp_path, nvcc)
    # What is asked for counts, whatever is here.
    other = tmp_path / "explicit"
    other.mkdir()
    output = configure("exit 9", other, nvcc, "-DCMAKE_CUDA_ARCHITECTURES=80-real")
    assert "for 80-real\n" in output
