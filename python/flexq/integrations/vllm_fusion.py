"""A pass over the graphs that vLLM compiles: norms and SiLU products become one operator with the linear they feed.

The GPU then writes quantized activations instead of activations that the next kernel quantizes. What counts is what
nodes are, not which model they come from: an RMS norm is vLLM's IR operator, of which other passes may have made
something else before (an all-reduce with its norm, say), and a SiLU product is vLLM's custom operator.
"""

import operator
import os
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass
from vllm.config import CompilationMode, VllmConfig, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.platforms import current_platform

import flexq
from flexq import ops

_PRODUCT = "silu_and_mul"
logger = init_logger(f"vllm.plugins.{__name__}")


class FlexQFusionPass(InductorPass):
    """What vLLM calls with each graph that it compiles, and with `uuid` in the key of its compile cache."""

    def __call__(self, graph: fx.Graph) -> None:
        norms, products = fuse_norms(graph), fuse_products(graph)
        VllmPatternMatcherPass.match_table["flexq_norms"] += norms  # vLLM's summary of all passes
        VllmPatternMatcherPass.match_table["flexq_products"] += products
        if norms or products:
            logger.info_once(f"FlexQ fused quantization with {norms} norms and {products} SiLU products of a graph")

    def uuid(self) -> str:
        return self.hash_source(flexq.__version__, Path(__file__).read_text())


def add_fusion_pass() -> None:
    """Has vLLM run the pass for the model it is building now, if it compiles it. May be called more than once."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or not _is_wanted(vllm_config):
        return
    compilation, key = vllm_config.compilation_config, current_platform.pass_key
    present = compilation.inductor_compile_config.setdefault(key, FlexQFusionPass())
    if not isinstance(present, FlexQFusionPass):
        logger.warning_once(f"FlexQ leaves quantization unfused: {key} is {type(present).__name__} already")
    elif not any(f"{sign}{_PRODUCT}" in compilation.custom_ops for sign in "+-"):
        compilation.custom_ops.append(f"+{_PRODUCT}")  # else it is a few operators, which differ between versions


def _is_wanted(vllm_config: VllmConfig) -> bool:
    compilation = vllm_config.compilation_config
    compiles = compilation.mode == CompilationMode.VLLM_COMPILE and compilation.backend == "inductor"
    return compiles and os.environ.get("FLEXQ_FUSE", "1") != "0"


def fuse_norms(graph: fx.Graph) -> int:
    """RMS norms, of a sum or not, that one quantized linear reads. Returns how many.

    The graph's order may need to be restored, and dead nodes be removed, which vLLM does after its passes.
    """
    return sum(_fuse_norm(graph, node) for node in list(graph.nodes) if _is_norm(node))


def fuse_products(graph: fx.Graph) -> int:
    """SiLU(gate) * up that one quantized linear reads. Returns how many."""
    return sum(_fuse_product(graph, node) for node in list(graph.nodes) if _is_product(node))


def _is_norm(node: fx.Node) -> bool:
    return _is_operator(node.target, "vllm_ir::rms_norm", "vllm_ir::fused_add_rms_norm")


def _is_product(node: fx.Node) -> bool:
    return node.target is auto_functionalized and _is_operator(node.args[0], f"_C::{_PRODUCT}")


def _is_operator(target: Any, *names: str) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.name() in names


def _fuse_norm(graph: fx.Graph, norm: fx.Node) -> bool:
    given = _arguments(norm)
    x, residual, weight = given["x"], given.get("x_residual"), given["weight"]
    parts = {0: norm} if residual is None else _parts(norm)
    linear = _reader(parts.get(0))
    if linear is None or given.get("variance_size") is not None or not _fits(x, residual, weight):
        return False
    arguments = (x, residual, weight, given["epsilon"], *linear.args[1:])
    with graph.inserting_before(linear):
        fused = _call(graph, torch.ops.flexq.rms_norm_linear.default, arguments)
        y, total = (_call(graph, operator.getitem, (fused, i)) for i in range(2))
    _replace(linear, y)
    if 1 in parts:
        _replace(parts[1], total)
    return True


def _fuse_product(graph: fx.Graph, product: fx.Node) -> bool:
    linear = _reader(_parts(product).get(1))
    if linear is None:
        return False
    with graph.inserting_before(linear):
        arguments = (product.kwargs["input"], *linear.args[1:])
        _replace(linear, _call(graph, torch.ops.flexq.silu_mul_linear.default, arguments))
    return True


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = (argument.name for argument in node.target._schema.arguments)
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _parts(node: fx.Node) -> dict[int, fx.Node]:
    """What is taken of a node's results; nothing if something else is done with them."""
    users = list(node.users)
    if any(user.target is not operator.getitem for user in users):
        return {}
    parts = {user.args[1]: user for user in users}
    return parts if len(parts) == len(users) else {}


def _reader(node: fx.Node | None) -> fx.Node | None:
    """The quantized linear whose input it is, if nothing else reads it."""
    if node is None or len(node.users) != 1:
        return None
    (user,) = node.users
    is_linear = user.target is torch.ops.flexq.linear.default and user.args[0] is node
    return user if is_linear and not user.kwargs else None


def _fits(x: fx.Node, residual: fx.Node | None, weight: fx.Node | None) -> bool:
    """Whether it is a norm that FlexQ has: a norm's weight in another dtype, as Gemma's, rounds otherwise."""
    if weight is None:
        return False
    values = x.meta["val"], (x if residual is None else residual).meta["val"], weight.meta["val"]
    features = values[0].shape[-1]
    return (
        values[0].dtype in ops.DTYPES
        and all(value.dtype == values[0].dtype for value in values)
        and values[1].shape == values[0].shape
        and values[2].shape == (features,)
        and values[2].is_contiguous()
    )


def _call(graph: fx.Graph, target: Any, arguments: tuple) -> fx.Node:
    """A node that knows what it will return, as passes and vLLM's lowering ask."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*fx.map_arg(arguments, lambda argument: argument.meta["val"]))
    return node


def _replace(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
