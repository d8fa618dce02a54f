"""A load test of `vllm serve`: many clients at once against a FlexQ checkpoint and, in the same run, other models.

    python benchmarks/serve_load.py FLEXQ_FOLDER [FLOAT_FOLDER ...] [--clients 64] [--requests 256] [--max-tokens 32]

Needs vLLM and openai. Each model is served by itself, one after the other. Prints requests/s, output tokens/s, the 50th
and 95th percentile of a request's seconds, and how many failed.
"""

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time

import openai


def start(folder: str, options: list[str]) -> tuple[subprocess.Popen, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command = [*server, "--port", str(port), "--served-model-name", "model", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    while True:
        try:
            client.models.list()
            return process, url
        except openai.APIConnectionError:
            if process.poll() is not None:
                raise SystemExit(f"the server of {folder} stopped with {process.returncode}") from None
            time.sleep(1)


async def load(url: str, clients: int, requests: int, max_tokens: int) -> dict[str, float]:
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600)
    chosen = random.Random(0)
    prompts = [" ".join(chosen.choices(["river", "stone", "light", "seven", "and"], k=chosen.randint(4, 96)))
               for _ in range(requests)]  # fmt: skip
    waiting = asyncio.Queue()
    for prompt in prompts:
        waiting.put_nowait(prompt)
    seconds, tokens, failed = [], 0, 0

    async def work():
        nonlocal tokens, failed
        while not waiting.empty():
            prompt = waiting.get_nowait()
            begin = time.perf_counter()
            try:
                answer = await client.completions.create(
                    model="model", prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
                )
                tokens += answer.usage.completion_tokens
                seconds.append(time.perf_counter() - begin)
            except openai.OpenAIError:
                failed += 1

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    total = time.perf_counter() - begin
    await client.close()
    cuts = statistics.quantiles(seconds, n=20) if len(seconds) > 1 else [0.0] * 19
    return {
        "requests/s": len(seconds) / total,
        "tokens/s": tokens / total,
        "p50 s": cuts[9],
        "p95 s": cuts[18],
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--options", default="", help="more of vllm serve's, in one string")
    args = parser.parse_args()
    for folder in args.models:
        process, url = start(folder, args.options.split())
        try:
            asyncio.run(load(url, 8, 16, 8))  # warms up
            figures = asyncio.run(load(url, args.clients, args.requests, args.max_tokens))
        finally:
            process.terminate()
            process.wait(60)
        print(f"{folder}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
