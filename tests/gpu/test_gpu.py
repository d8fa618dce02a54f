"""The CUDA backend through Python. Skipped where there is no GPU that FlexQ can use."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import flexq
import pytest
import torch
from flexq import _core, ops
from flexq.experts import quantize_experts
from flexq.ops import linear_layers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def unusable() -> str:
    """Why the GPU cannot be used; empty if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _core.check_device("cuda")
    except RuntimeError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(unusable()), reason=unusable() or "usable")


def layer(n=200, k=576, config=None, bias=True) -> tuple[flexq.Linear, flexq.Linear]:
    """The same layer on the CPU and on the GPU."""
    torch.manual_seed(0)
    linear = flexq.Linear.from_float(nn.Linear(k, n, bias=bias), config)
    return linear, copy.deepcopy(linear).cuda()


@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("rotation", ("none", "hadamard128"))
@pytest.mark.parametrize("bits", (6, 8))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("m", (1, 8, 9, 33, 200))
def test_equals_the_cpu(m, dtype, bits, rotation, scheme):
    cpu, gpu = layer(config=flexq.LayerConfig(act_bits=bits, rotation=rotation, scheme=scheme))
    x = torch.randn(m, 576).to(dtype)
    arguments = (m, 576, bits, scheme, rotation)
    codes = [
        flexq.activation_codes(flexq.quantize_activation(v, bits, scheme, rotation), *arguments) for v in (x, x.cuda())
    ]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*codes, strict=True))
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(gpu.to(dtype)(x.cuda()).cpu(), cpu.to(dtype)(x), rtol=tolerance, atol=tolerance)


def test_moves_without_loss():
    cpu, gpu = layer()
    assert gpu.is_prepacked and gpu._packed.is_cuda
    back = copy.deepcopy(gpu).cpu()
    assert all(torch.equal(a, b) for a, b in zip(back.canonical(), cpu.canonical(), strict=True))
    state, expected = gpu.state_dict(), cpu.state_dict()
    assert all(torch.equal(state[name].cpu(), expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("n", "k"), ((1, 64), (17, 100), (300, 576)))
def test_an_embedding_equals_the_cpus(n, k, dtype):
    torch.manual_seed(0)
    canonical = flexq.quantize_weight(torch.randn(n, k), "channel", "none", 8)
    cpu = flexq.Embedding(n, k, embed_scale=3.3, rounds_scale=True, dtype=dtype).set_canonical(*canonical).prepack()
    gpu = copy.deepcopy(cpu).cuda()
    ids = torch.randint(0, n, (3, 7))
    on_gpu = ids.cuda()
    assert torch.equal(gpu(on_gpu).cpu(), cpu(ids)) and torch.equal(gpu.dequantize().cpu(), cpu.dequantize())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gpu.canonical(), canonical, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu(on_gpu)
    other = torch.randint(0, n, (3, 7))
    on_gpu.copy_(other)
    graph.replay()
    assert torch.equal(y.cpu(), cpu(other))


def test_captured_in_a_graph():
    _, gpu = layer()
    static = torch.randn(4, 576, device="cuda", dtype=torch.bfloat16)
    gpu.to(torch.bfloat16)
    with torch.inference_mode():
        gpu(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gpu(static)
        for _ in range(3):
            x = torch.randn_like(static)
            static.copy_(x)
            graph.replay()
            assert torch.equal(y, gpu(x))


@pytest.mark.parametrize("m", (1, 40, 300))
def test_two_graphs_share_no_workspace(m):
    _, gpu = layer(n=1000, k=2048)
    gpu.to(torch.bfloat16)
    inputs = [torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    expected = [gpu(x) for x in inputs]
    graphs, outputs = [], []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(gpu(x))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y, want in zip(outputs, expected, strict=True))


def experts_on(device: str, desc: ops.ExpertsDesc) -> list[torch.Tensor]:
    """The same prepacked gate_up and down, and their biases, on either device."""
    torch.manual_seed(0)
    packed, biases = [], []
    for projection in ("gate_up", "down"):
        n, k = desc.shape(projection)
        config = flexq.LayerConfig(scheme=desc.scheme(projection))
        planes, scales = quantize_experts(torch.randn(desc.experts, n, k) / k**0.5, config)
        packed.append(ops.experts_prepack(planes.to(device), scales.to(device), projection, desc))
        biases.append(torch.randn(desc.experts, n).to(device))
        back = ops.experts_unprepack(packed[-1], projection, desc)
        assert torch.equal(back[0].cpu(), planes) and torch.equal(back[1].cpu(), scales)
    return [*packed, *biases]


@pytest.mark.parametrize("ids_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("shape", ((3, 576, 200), (16, 256, 384)))
@pytest.mark.parametrize("m", (0, 1, 9, 200))
def test_experts_equal_the_cpus(m, shape, scheme, ids_dtype):
    desc = ops.ExpertsDesc(*shape, gate_up_scheme=scheme, down_scheme=scheme, limit=7.0)
    x = torch.randn(m, desc.hidden)
    weights, ids = torch.rand(m, shape[0]).topk(2)
    results = []
    for device in ("cpu", "cuda"):
        up, down, up_bias, down_bias = experts_on(device, desc)
        moved = (t.to(device) for t in (x, ids.to(ids_dtype), weights))
        results.append(ops.experts_forward(*moved, up, down, desc, up_bias, down_bias).cpu())
    # A value of h may get a neighbouring code, which is felt in all of its token.
    error = (results[1] - results[0]).norm(dim=1) / results[0].norm(dim=1)
    assert (error <= 0.05).all()
    assert m < 9 or error.median() <= 1e-4


def test_experts_in_a_graph_take_any_routing():
    desc = ops.ExpertsDesc(16, 256, 384)
    layer = experts_on("cuda", desc)
    x = torch.randn(12, 256, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(12, 4, device="cuda")
    ids = torch.randint(16, (12, 4), device="cuda")

    def run():
        return ops.experts_forward(x, ids, weights, *layer[:2], desc, *layer[2:])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(5):
        ids.copy_(torch.randint(-1, 16, ids.shape, device="cuda"))  # -1: not here
        x.normal_()
        graph.replay()
        assert torch.equal(y, run())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("m", (1, 40, 600))
def test_fused_quantizers_equal_the_cpus(m, scheme, dtype):
    torch.manual_seed(0)
    x, other, weight = (torch.randn(*s).to(dtype) for s in ((m, 1100), (m, 1100), (1100,)))
    for name, arguments in (("rms_norm_quantize", (x, other, weight, 1e-5)), ("silu_mul_quantize", (x, other))):
        results = []
        for device in ("cpu", "cuda"):
            moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
            quantized = getattr(flexq, name)(*moved, 8, scheme)
            if isinstance(quantized, tuple):
                quantized, total = quantized
                assert torch.equal(total.cpu(), x + other)
            results.append([t.cpu() for t in flexq.activation_codes(quantized, m, 1100, 8, scheme, "hadamard128")])
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-2, atol=1e-7)
        different = (results[1][0] - results[0][0]).abs()
        assert different.max() <= 2 and (different > 0).float().mean() < 0.05


def test_two_streams_at_once():
    _, gpu = layer(n=3000, k=4096)
    inputs = [torch.randn(5, 4096, device="cuda") for _ in range(2)]
    expected = [gpu(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    outputs = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(gpu(inputs[i]))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i]) for i in range(2) for y in outputs[i])


@pytest.mark.parametrize("m", (4, 600))
def test_threads_that_launch_the_same_kernels_in_other_sizes(m):
    layers = [layer(n, 512)[1].to(torch.bfloat16) for n in (200, 2304, 6000, 17000)]
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()

    @torch.inference_mode()
    def run(one):
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = [one(x) for _ in range(100)]
            torch.cuda.current_stream().synchronize()
        return outputs

    expected = [run(one)[0] for one in layers]
    with ThreadPoolExecutor(len(layers)) as pool:
        for outputs, wanted in zip(pool.map(run, layers), expected, strict=True):
            assert all(torch.equal(y, wanted) for y in outputs)


def test_same_bits_on_every_run():
    for n, k in ((256, 8192), (8192, 1024), (1000, 4096)):
        _, gpu = layer(n, k)
        for m in (1, 16, 32, 100, 1000):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            gpu.to(torch.bfloat16)
            first = gpu(x)
            assert all(torch.equal(gpu(x), first) for _ in range(10))


def test_many_tokens_equal_few():
    _, gpu = layer()
    x = torch.randn(100, 576, device="cuda")
    torch.testing.assert_close(gpu(x), torch.cat([gpu(row[None]) for row in x]), rtol=1e-5, atol=1e-5)


def test_strided_rows():
    _, gpu = layer()
    wide = torch.randn(7, 600, device="cuda", dtype=torch.float16)
    assert torch.equal(gpu(wide[:, 3:579]), gpu(wide[:, 3:579].contiguous()))


def test_devices_must_agree():
    cpu, gpu = layer()
    with pytest.raises(ValueError, match="x is on cpu, the weight on cuda"):
        gpu(torch.randn(1, 576))
    with pytest.raises(ValueError, match="x is on cuda:0, the weight on cpu"):
        cpu(torch.randn(1, 576, device="cuda"))


def test_kernels_in_cpp_equal_those_in_python():
    _, gpu = layer()
    shared = ("group", "hadamard128")
    x = torch.randn(4, 6, 600, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(200, device="cuda")
    for view in (x[..., :576], x[0, :, 24:], x[..., :576].transpose(0, 1), x[:0, :, :576], x[0, 0, :576]):
        arguments = (view, gpu._packed, bias, 200, 8, *shared)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            assert torch.equal(torch.ops.flexq.linear(*arguments), linear_layers._linear(*arguments))
            norm = (view, view.flip(0), torch.ones(576, device="cuda", dtype=x.dtype), 1e-5, *arguments[1:])
            results = torch.ops.flexq.rms_norm_linear(*norm), linear_layers._rms_norm_linear(*norm)
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            product = (torch.cat([view, view.flip(0)], -1), *arguments[1:])
            assert torch.equal(torch.ops.flexq.silu_mul_linear(*product), linear_layers._silu_mul_linear(*product))
    with pytest.raises(ValueError, match="the activation is on cpu, the weight on cuda:0"):
        flexq.gemm(flexq.quantize_activation(torch.randn(2, 576)), gpu._packed, None, 2, 200, 576, 8, *shared)


def test_host_time_of_an_operator(capsys):
    """Microseconds to queue one in eager mode; F.linear takes 6 to 10."""
    n = k = 1024
    shared = ("group", "hadamard128")
    x, norm = torch.randn(1, k, device="cuda", dtype=torch.bfloat16), torch.ones(k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    packed = flexq.prepack(*flexq.quantize_weight(weight), k, *shared)
    quantized, both = flexq.quantize_activation(x), torch.cat([x, x], -1)
    calls = {
        "linear": lambda: torch.ops.flexq.linear(x, packed, None, n, 8, *shared),
        "gemm": lambda: torch.ops.flexq.gemm(quantized, packed, None, 1, n, k, 8, *shared, torch.bfloat16),
        "rms_norm_quantize": lambda: torch.ops.flexq.rms_norm_quantize(x, x, norm, 1e-6, 8, *shared),
        "silu_mul_quantize": lambda: torch.ops.flexq.silu_mul_quantize(x, x, 8, *shared),
        "rms_norm_linear": lambda: torch.ops.flexq.rms_norm_linear(x, x, norm, 1e-6, packed, None, n, 8, *shared),
        "silu_mul_linear": lambda: torch.ops.flexq.silu_mul_linear(both, packed, None, n, 8, *shared),
        "F.linear": lambda: nn.functional.linear(x, weight),
    }
    times = {}
    with torch.inference_mode():
        for name, call in calls.items():
            rounds = []
            for _ in range(30):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(100):  # fewer than the queue holds
                    call()
                rounds.append((time.perf_counter() - begin) * 1e4)
            times[name] = min(rounds)
    with capsys.disabled():
        print("\nhost us:", ", ".join(f"{name} {us:.1f}" for name, us in times.items()))
    assert all(us < 30 for us in times.values())


def test_compiles_without_graph_breaks():
    _, gpu = layer()
    compiled = torch.compile(gpu, fullgraph=True)
    x = torch.randn(3, 576, device="cuda")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), gpu(x))


def test_model_generates_as_on_the_cpu():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    cpu = flexq.quantize_model(LlamaForCausalLM(config).eval())
    gpu = copy.deepcopy(cpu).cuda()
    ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(gpu(ids.cuda()).logits.cpu(), cpu(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("rotation", ("none", "hadamard128"))
@pytest.mark.parametrize("k", (64, 300, 2500))
def test_dequantized_on_the_device(scheme, rotation, k):
    layer = flexq.Linear.from_float(torch.nn.Linear(k, 70), flexq.LayerConfig(6, scheme, rotation))
    expected = layer.dequantize()
    got = layer.cuda().dequantize()
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_gradients_and_scales_that_are_refused():
    torch.manual_seed(0)
    layer = flexq.Linear.from_float(torch.nn.Linear(300, 70))
    x, gradient = torch.randn(9, 300), torch.randn(9, 70)
    results = []
    for device in ("cpu", "cuda"):
        here = x.to(device).detach().clone().requires_grad_(True)
        layer.to(device)(here).backward(gradient.to(device))
        results.append(here.grad.cpu())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    planes, scales = layer.canonical()
    scales[3, 1] = float("nan")
    broken = flexq.Linear.from_canonical(planes, scales, layer, layer.config, prepack=False)
    with pytest.raises(ValueError, match="scales must be finite"):
        broken.prepack()
