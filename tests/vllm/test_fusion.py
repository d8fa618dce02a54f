"""The fusion pass on graphs as vLLM makes them, compiled with vLLM's own passes: what is fused, and that it computes
the same. On a CPU vLLM does not run these passes by itself; it has all that the graphs hold."""

import flexq
import pytest
import torch
from engines import DEVICE
from flexq.integrations.vllm_fusion import FlexQFusionPass, add_fusion_pass
from torch import fx, nn
from vllm.compilation.passes.inductor_pass import CallableInductorPass, InductorPass, pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.ir.op import enable_torch_wrap
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.platforms import current_platform

current_platform.import_kernels()  # torch.ops._C
K, INNER, EPS = 256, 384, 1e-5
FORMAT = ("channel", "hadamard128")
NORM, PRODUCT, LINEAR = "flexq.rms_norm_linear.default", "flexq.silu_mul_linear.default", "flexq.linear.default"


def values(*shape: int, seed: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def compiling() -> VllmConfig:
    config = VllmConfig()
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE  # which is another one on CPUs
    return config


@pytest.fixture(autouse=True)
def config():
    """Of a model that vLLM compiles; its layers are made in it."""
    config = compiling()
    with set_current_vllm_config(config):
        yield config


class Linear(nn.Module):
    """What FlexQ's method in vLLM calls."""

    def __init__(self, n: int, k: int, act_bits: int = 8, dtype: torch.dtype | None = None):
        super().__init__()
        planes, scales = flexq.quantize_weight(values(n, k, seed=n + k, dtype=torch.float32) / k**0.5, *FORMAT)
        self.register_buffer("packed", flexq.prepack(planes, scales, k, *FORMAT))
        self.register_buffer("bias", None if dtype is None else values(n, seed=n, dtype=dtype))
        self.rest = (n, act_bits, *FORMAT, 6)

    def forward(self, x):
        return torch.ops.flexq.linear(x, self.packed, self.bias, *self.rest)


def norm_of(kind: type[nn.Module], dtype: torch.dtype, **options) -> nn.Module:
    norm = kind(K, EPS, **options).to(DEVICE, dtype)
    if norm.weight.requires_grad:
        norm.weight.data += values(K, seed=1, dtype=dtype) / 10
    return norm


def product_on_a_gpu() -> SiluAndMul:
    product = SiluAndMul()
    product.op, product._forward_method = torch.ops._C.silu_and_mul, product.forward_cuda
    return product


class Mlp(nn.Module):
    """What stands between two attentions: sum and norm, an MLP, sum and norm, a linear. Its first norm has no sum if it
    is called without a residual."""

    def __init__(self, dtype: torch.dtype, kind: type[nn.Module] = RMSNorm, act_bits: int = 8, bias: bool = False):
        super().__init__()
        self.first, self.second, self.product = norm_of(kind, dtype), norm_of(kind, dtype), product_on_a_gpu()
        rest = (act_bits, dtype if bias else None)
        self.gate_up, self.down = Linear(2 * INNER, K, *rest), Linear(K, INNER, *rest)
        self.qkv = Linear(3 * K, K, *rest)

    def forward(self, x, residual=None):
        if residual is None:
            normed, residual = self.first(x), x
        else:
            normed, residual = self.first(x, residual)
        x, residual = self.second(self.down(self.product(self.gate_up(normed))), residual)
        return self.qkv(x), residual

    def by_hand(self, x, residual=None):
        """What the fused graph is to compute, by FlexQ's operators."""
        flexq = torch.ops.flexq

        def arguments(linear: Linear) -> tuple:
            return (linear.packed, linear.bias, *linear.rest)

        weights = [n.weight + (1 if isinstance(n, GemmaRMSNorm) else 0) for n in (self.first, self.second)]
        y, total = flexq.rms_norm_linear(x, residual, weights[0], EPS, *arguments(self.gate_up))
        y = flexq.silu_mul_linear(y, *arguments(self.down))
        return flexq.rms_norm_linear(y, total, weights[1], EPS, *arguments(self.qkv))


class Spy(InductorPass):
    """Notes the graph's operators."""

    def __init__(self, targets: list[str]):
        self.targets = targets

    def __call__(self, graph: fx.Graph) -> None:
        graph.eliminate_dead_code()
        for node in graph.nodes:
            self.targets.append(str(node.args[0] if "auto_functionalized" in str(node.target) else node.target))


class Compiled:
    """A module as vLLM compiles it, with FlexQ's pass or without. `targets` are the operators of its graph."""

    def __init__(self, module: nn.Module, config: VllmConfig, fuse: bool):
        manager, self.targets = PostGradPassManager(), []
        manager.configure(config)
        if DEVICE == "cpu":
            manager.fix_functionalization = lambda graph: None  # names kernels that are built for GPUs only
        if fuse:
            manager.add(FlexQFusionPass())
        manager.add(Spy(self.targets))
        options = config.compilation_config.inductor_compile_config | {
            "post_grad_custom_post_pass": manager,
            "pre_grad_custom_pass": VllmIRInplaceFunctionalizationPass(config),
        }
        torch._dynamo.reset()
        self.compiled = torch.compile(module, fullgraph=True, dynamic=True, options=options)

    def __call__(self, *args):
        caches = torch.compiler.config.patch(force_disable_caches=True)
        with pass_context(Range(1, 1 << 20)), enable_torch_wrap(True), torch.no_grad(), caches:
            return self.compiled(*args)


def inputs(tokens: int, dtype: torch.dtype, with_residual: bool = True) -> list[torch.Tensor]:
    return [values(tokens, K, seed=seed, dtype=dtype) for seed in range(2 if with_residual else 1)]


@pytest.mark.parametrize(
    ("dtype", "settings", "with_residual", "tolerance"),
    [
        (torch.bfloat16, {}, True, 0.02),
        (torch.float16, {"act_bits": 6, "bias": True}, False, 0.05),
        (torch.float32, {"bias": True}, True, 0.001),
        (torch.float32, {"kind": GemmaRMSNorm}, True, 0.001),
    ],
)
def test_norms_and_products_are_fused(config, dtype, settings, with_residual, tolerance):
    mlp = Mlp(dtype, **settings)
    fused, plain = Compiled(mlp, config, fuse=True), Compiled(mlp, config, fuse=False)
    for tokens in (5, 33):  # of one graph
        x = inputs(tokens, dtype, with_residual)
        y = fused(*(t.clone() for t in x))  # vLLM may write into what its norms are given
        with torch.no_grad():
            expected = mlp.by_hand(*x) if with_residual else mlp.by_hand(x[0], None)
        assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
        for a, b in zip(y, plain(*x), strict=True):  # where a float rounds otherwise, an activation is the next code
            assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()
    assert [fused.targets.count(target) for target in (NORM, PRODUCT, LINEAR)] == [2, 1, 0]
    assert [plain.targets.count(target) for target in (NORM, PRODUCT, LINEAR)] == [0, 0, 3]
    assert not any("silu_and_mul" in target or "rms_norm.default" in target for target in fused.targets)


class Around(nn.Module):
    """A norm and a linear, and what else reads the norm."""

    def __init__(self, forward, norm: nn.Module):
        super().__init__()
        self.norm, self.product, self.linear = norm, product_on_a_gpu(), Linear(2 * K, K)
        self.other, self.plain = Linear(K, K, 6), nn.Linear(K, K, dtype=torch.bfloat16, device=DEVICE)
        self._run = forward

    def forward(self, x, residual):
        return self._run(self, x, residual)


def read_by_two(m, x, residual):
    normed, total = m.norm(x, residual)
    return m.linear(normed), m.other(normed), total


def read_by_a_router(m, x, residual):
    normed = m.norm(x)
    return m.linear(normed), m.plain(normed)


def returned(m, x, residual):
    normed, total = m.norm(x, residual)
    return m.linear(normed), normed, total


def of_a_sum_in_a_wider_dtype(m, x, residual):
    return m.linear(m.norm(x, residual.float())[0])


def without_a_quantized_linear(m, x, residual):
    return m.plain(m.norm(x))


def product_that_is_returned(m, x, residual):
    product = m.product(torch.cat([x, residual], -1))
    return m.linear(product), product


def only_the_linear(m, x, residual):
    return m.linear(m.norm(x, residual)[0])


@pytest.mark.parametrize(
    ("forward", "kind", "options"),
    [
        (read_by_two, RMSNorm, {}),
        (read_by_a_router, RMSNorm, {}),
        (returned, RMSNorm, {}),
        (of_a_sum_in_a_wider_dtype, RMSNorm, {}),
        (without_a_quantized_linear, RMSNorm, {}),
        (product_that_is_returned, RMSNorm, {}),
        (only_the_linear, GemmaRMSNorm, {}),  # 1 + weight is float32
        (only_the_linear, RMSNorm, {"has_weight": False}),
        (only_the_linear, RMSNorm, {"var_hidden_size": K // 2}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_other_graphs_stay(config, forward, kind, options):
    module = Around(forward, norm_of(kind, torch.bfloat16, **options))
    fused, plain = Compiled(module, config, fuse=True), Compiled(module, config, fuse=False)
    results = [run(*inputs(7, torch.bfloat16)) for run in (fused, plain)]
    assert fused.targets == plain.targets
    results = [[r] if isinstance(r, torch.Tensor) else r for r in results]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def pass_of(config: VllmConfig):
    with set_current_vllm_config(config):
        add_fusion_pass()
        add_fusion_pass()
    return config.compilation_config.inductor_compile_config.get(current_platform.pass_key)


def test_the_pass_comes_with_what_it_needs():
    with_pass, without, opposed = compiling(), compiling(), compiling()
    assert isinstance(pass_of(with_pass), FlexQFusionPass)
    assert with_pass.compilation_config.custom_ops.count("+silu_and_mul") == 1
    without.compilation_config.custom_ops.append("+silu_and_mul")
    assert with_pass.compute_hash() != without.compute_hash()  # of vLLM's compile cache
    opposed.compilation_config.custom_ops.append("-silu_and_mul")
    pass_of(opposed)
    assert "+silu_and_mul" not in opposed.compilation_config.custom_ops


def test_the_pass_stays_away(monkeypatch):
    eager = compiling()
    eager.compilation_config.mode = CompilationMode.NONE
    assert pass_of(eager) is None
    occupied = compiling()
    theirs = CallableInductorPass(lambda graph: None, uuid="theirs")
    occupied.compilation_config.inductor_compile_config[current_platform.pass_key] = theirs
    assert pass_of(occupied) is theirs
    assert "+silu_and_mul" not in occupied.compilation_config.custom_ops
    monkeypatch.setenv("FLEXQ_FUSE", "0")
    assert pass_of(compiling()) is None
