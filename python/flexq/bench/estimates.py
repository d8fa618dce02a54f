"""What the dispatcher estimates with a table of costs: a process of its own, as the library reads the table once.

    python -m flexq.bench.estimates < QUESTIONS     # with FLEXQ_COSTS set

Imports nothing but the library, so that a question takes a second.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flexq import _core

Question = tuple[int, int, int, int, str]  # n, k, m, act_bits, scheme


def ask(table: str, questions: Sequence[Question], device_index: int = 0) -> list[dict[str, float]]:
    """Microseconds that a table gives each kernel, by name, for each GEMM.

    Raises:
        ValueError: the library refuses the table.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "costs"
        file.write_text(table)
        done = subprocess.run(
            [sys.executable, "-m", "flexq.bench.estimates", str(device_index)],
            input=json.dumps(list(questions)),
            env=os.environ | {"FLEXQ_COSTS": str(file)},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise ValueError(
            f"estimates failed: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}"
        )
    return json.loads(done.stdout)


def main() -> None:
    stream = _core.Stream.cuda(int(sys.argv[1]), 0)
    answers = []
    for n, k, m, act_bits, scheme in json.load(sys.stdin):
        desc = _core.WeightDesc(n, k, scheme, "hadamard128")
        answers.append(dict(_core.gemm_kernels(stream, desc, act_bits, m)))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
