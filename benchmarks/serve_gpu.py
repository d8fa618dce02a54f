"""vLLM on a GPU, by the way of each quantization: a model of a known shape with random weights, nothing downloaded.

    python benchmarks/serve_gpu.py [--shape llama-3.1-8b] [--contenders bf16 fp8 flexq-channel ...] [--out results.json]

Each contender runs in a process of its own, compiled and in CUDA graphs as vLLM does by itself. Measured: a step at
batches of 1 to 256, prompts, and loads of many concurrent requests whose lengths are drawn from a log-normal
distribution with a fixed seed (medians of 120 and 110 tokens, about those of ShareGPT); output tokens/s, time to first
token and between tokens (50th and 95th percentile), the KV cache's room in tokens, seconds to start, requests failed.

--tensor-parallel 2 needs two GPUs, and takes NCCL's all-reduce. --at-once 4 needs four of one host, and a quarter of
the time. Humming's contenders need the package humming-kernels.
"""

import argparse
import asyncio
import concurrent.futures
import itertools
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flexq.bench import models

_DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _DENSE | models.SHAPES["llama-3.1-8b"],
    "qwen3-32b": _DENSE
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "attention_bias": False,
    },
    "qwen3-30b-a3b": _DENSE
    | models.SHAPES["qwen3-30b-a3b"]
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
}

_INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*gate$"],
}
_HEAD = {"weight_bits": 8, "scheme": "channel", "act_bits": 8}


def _humming(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, str]:
    return {
        "VLLM_HUMMING_ONLINE_QUANT_CONFIG": json.dumps(weights),
        "VLLM_HUMMING_INPUT_QUANT_CONFIG": json.dumps(inputs),
    }


def _flexq(defaults: dict[str, Any], layers: dict[str, Any] | None = None) -> dict[str, Any]:
    plan = {"format": "flexq-plan", "version": 1, "defaults": {"act_bits": 8} | defaults, "layers": layers or {}}
    return {"quantization": "flexq", "plan": plan | {"produced_by": {}}}


# quantization: vLLM's argument; config: of the checkpoint; plan: FLEXQ_PLAN; environment: variables.
CONTENDERS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int8": {"config": _INT8},
    "humming-group": {
        "quantization": "humming",
        "environment": _humming({"dtype": "int6", "group_size": 128}, {"dtype": "int8"}),
    },
    "humming-channel": {
        "quantization": "humming",
        "environment": _humming({"dtype": "int6", "hadamard_block_size": 128}, {"dtype": "int8"}),
    },
    "flexq-group": _flexq({"scheme": "group"}),
    "flexq-channel": _flexq({"scheme": "channel"}),
    "flexq-channel-head": _flexq({"scheme": "channel"}, {"lm_head": _HEAD}),
    "flexq-channel-head-unfused": _flexq({"scheme": "channel"}, {"lm_head": _HEAD})
    | {"environment": {"FLEXQ_FUSE": "0"}},
    "flexq-5-bits-head": _flexq({"scheme": "channel", "weight_bits": 5}, {"lm_head": _HEAD}),
}
DEFAULT_CONTENDERS = ("bf16", "fp8", "int8", "humming-group", "flexq-group", "flexq-channel", "flexq-channel-head")
BATCHES = (1, 8, 32, 64, 128, 256)
PROMPTS = ((1, 512), (1, 4096), (8, 2048))
LOADS = (64, 256)
_MOST_TOKENS = 4608  # of a sequence


class Served:
    """An engine and what is asked of it."""

    def __init__(self, engine, vocabulary: int):
        self.engine, self.vocabulary = engine, vocabulary
        self.asked, self.requests, self.failed = 0, 0, 0

    def prompt(self, tokens: int) -> list[int]:
        """One that was not asked before."""
        self.asked += 1
        chosen = random.Random(self.asked)
        return [chosen.randrange(10, self.vocabulary) for _ in range(tokens)]

    async def request(self, prompt: list[int], output: int, streamed: bool = False) -> list[float]:
        """When each of the new tokens came, if streamed; else when the last one did."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.requests += 1
        params = SamplingParams(
            temperature=0,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
        )
        times: list[float] = []
        try:
            async for answer in self.engine.generate(
                {"prompt_token_ids": prompt}, params, request_id=str(self.requests)
            ):
                times += [time.perf_counter()] * max(1, len(answer.outputs[0].token_ids) if streamed else 1)
        except Exception as error:
            print(f"a request failed: {error}", file=sys.stderr)
            self.failed += 1
        return times

    async def seconds(self, batch: int, prompt: int, output: int, repeats: int = 2) -> float:
        """Of a whole batch, the fastest of some."""
        least = float("inf")
        for _ in range(repeats):
            prompts = [self.prompt(prompt) for _ in range(batch)]
            begin = time.perf_counter()
            await asyncio.gather(*(self.request(ids, output) for ids in prompts))
            least = min(least, time.perf_counter() - begin)
        return least

    async def step(self, batch: int) -> float:
        """Seconds; NaN where something else took longer than the steps."""
        few, many = 2, 66
        # Repeated: kernels of a peer may be compiled meanwhile, for how requests happen to come together.
        seconds = await self.seconds(batch, 32, many, repeats=3) - await self.seconds(batch, 32, few, repeats=6)
        return seconds / (many - few) if seconds > 0 else float("nan")

    async def load(self, clients: int) -> dict[str, float]:
        """`clients` requests at a time, four for each client in all."""
        chosen = random.Random(0)

        def length(median: float, spread: float, most: int) -> int:
            return min(most, max(4, round(median * chosen.lognormvariate(0, spread))))

        sizes = [(length(120, 1.1, 1024), length(110, 0.9, 512)) for _ in range(4 * clients)]
        waiting = [(self.prompt(prompt), output) for prompt, output in reversed(sizes)]
        first, between, tokens = [], [], 0

        async def client() -> None:
            nonlocal tokens
            while waiting:
                prompt, output = waiting.pop()
                begin = time.perf_counter()
                times = await self.request(prompt, output, streamed=True)
                if not times:
                    continue
                tokens += len(times)
                first.append(times[0] - begin)
                between.extend(b - a for a, b in itertools.pairwise(times))

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - begin
        result = {f"tokens_per_s_{clients}": tokens / seconds}
        for name, values in (("first", first), ("between", between)):
            for percent in (50, 95) if len(values) > 1 else ():
                value = statistics.quantiles(values, n=100)[percent - 1]
                result[f"{name}_ms_p{percent}_{clients}"] = value * 1e3
        return result


async def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    contender, config = CONTENDERS[name], dict(SHAPES[arguments.shape])
    config |= {"num_hidden_layers": arguments.layers or config["num_hidden_layers"]}
    with tempfile.TemporaryDirectory() as folder:
        if "config" in contender:
            config["quantization_config"] = contender["config"]
        Path(folder, "config.json").write_text(json.dumps(config))
        if "plan" in contender:
            Path(folder, "plan.json").write_text(json.dumps(contender["plan"]))
            os.environ["FLEXQ_PLAN"] = str(Path(folder, "plan.json"))
        begin = time.perf_counter()
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=_MOST_TOKENS,
                gpu_memory_utilization=arguments.memory,
                tensor_parallel_size=arguments.tensor_parallel,
                disable_custom_all_reduce=arguments.tensor_parallel > 1,
                max_num_seqs=max(*arguments.batches, *arguments.loads, 8),
                enable_prefix_caching=False,
                enforce_eager=arguments.eager,
                quantization=contender.get("quantization"),
            )
        )
        results = {"start_s": time.perf_counter() - begin}
    try:
        served = Served(engine, config["vocab_size"])
        await served.seconds(4, 64, 8, repeats=1)
        cache = engine.vllm_config.cache_config
        if cache.num_gpu_blocks:
            results["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
        for batch in arguments.batches:
            results[f"step_ms_{batch}"] = await served.step(batch) * 1e3
        for batch, prompt in arguments.prompts:
            results[f"prompt_ms_{batch}x{prompt}"] = await served.seconds(batch, prompt, 1, repeats=6) * 1e3
        for clients in arguments.loads:
            results |= await served.load(clients)
        return results | {"failed": served.failed}
    finally:
        engine.shutdown()


def run(name: str, arguments: argparse.Namespace, gpus: str | None) -> dict[str, Any]:
    """A contender in a process of its own, on these GPUs (all if None); {"error": ...} if it stops."""
    environment = os.environ | CONTENDERS[name].get("environment", {})
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    with tempfile.NamedTemporaryFile("r", suffix=".json") as results:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--out", results.name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        text = results.read()
    if done.returncode != 0 or not text:
        lines = [line for line in done.stdout.splitlines() if "Error" in line or "error" in line] or [done.stdout]
        return {"error": lines[-1][-400:], "log": done.stdout[-6000:]}
    return json.loads(text)


def run_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All contenders, `--at-once` at a time, each of those on GPUs of its own."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = given.split(",") if given else [str(i) for i in range(arguments.at_once * arguments.tensor_parallel)]
    if arguments.at_once > 1 and len(ids) < arguments.at_once * arguments.tensor_parallel:
        sys.exit(
            f"{arguments.at_once} contenders at once need {arguments.tensor_parallel} GPUs each, there are {len(ids)}"
        )
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for i in range(arguments.at_once):
        own = ids[i * arguments.tensor_parallel : (i + 1) * arguments.tensor_parallel]
        free.put(",".join(own) if arguments.at_once > 1 else None)
    results: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def one(name: str) -> None:
        gpus, begin = free.get(), time.perf_counter()
        try:
            result = run(name, arguments, gpus)
        finally:
            free.put(gpus)
        with lock:
            results[name] = result
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            if arguments.out:
                Path(arguments.out).write_text(json.dumps(results, indent=1))

    with concurrent.futures.ThreadPoolExecutor(arguments.at_once) as threads:
        list(threads.map(one, arguments.contenders))
    return {name: results[name] for name in arguments.contenders}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each measurement, a column for each contender."""
    done = {name: values for name, values in results.items() if "error" not in values}
    rows = list(dict.fromkeys(key for values in done.values() for key in values))
    width = max((len(row) for row in rows), default=0)
    lines = [" " * width + "".join(f"{name:>20}" for name in done)]
    for row in rows:
        cells = (f"{values[row]:20.2f}" if row in values else f"{'':>20}" for values in done.values())
        lines.append(f"{row:{width}}" + "".join(cells))
    lines += [f"{name}: {values['error']}" for name, values in results.items() if "error" in values]
    return "\n".join(lines)


def pair(text: str) -> tuple[int, int]:
    batch, _, prompt = text.partition("x")
    return int(batch), int(prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(DEFAULT_CONTENDERS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES), help="of steps")
    parser.add_argument("--prompts", nargs="*", type=pair, default=list(PROMPTS), metavar="BATCHxTOKENS")
    parser.add_argument("--loads", nargs="*", type=int, default=list(LOADS), help="concurrent requests")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument(
        "--at-once", type=int, default=1, help="contenders at the same time, each on GPUs of its own (of one host)"
    )
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's memory that vLLM may take")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--eager", action="store_true", help="neither compiled nor in CUDA graphs")
    parser.add_argument("--out", help="a JSON file of all results")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        results: dict[str, Any] = asyncio.run(measure(arguments.only, arguments))
    else:
        results = run_all(arguments)
        print(table(results))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
