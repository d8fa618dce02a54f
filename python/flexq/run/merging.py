"""Layers with one input and the same settings as one GEMM over their rows: q/k/v, gate/up.

What the parts of a merged layer share during a forward pass travels with their input, as an attribute of that tensor.
Nothing is kept on a module, so that threads can run one model at the same time.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flexq.linear import Linear
from flexq.packed import is_meant, note_meaning
from flexq.plan import LayerConfig
from flexq.quantize.layers import replace_module
from flexq.quantize.tracing import Call

_numbers = itertools.count()


class MergedLinear(Linear):
    """Layers with one input as one: their rows below each other. Each layer's place has a `MergedPart`."""

    is_flexq_layer = False  # its parts are

    def __init__(self, layers: list[Linear]):
        first = layers[0]
        sizes = [layer.out_features for layer in layers]
        super().__init__(first.in_features, sum(sizes), False, first.config, "meta", first.weight_dtype)
        planes, scales = zip(*(layer.canonical() for layer in layers), strict=True)
        self._register_canonical(torch.cat(planes), torch.cat(scales))
        self.has_bias = [layer.bias is not None for layer in layers]
        if any(self.has_bias):
            like = next(layer.bias for layer in layers if layer.bias is not None)
            biases = [like.new_zeros(n) if b.bias is None else b.bias for n, b in zip(sizes, layers, strict=True)]
            self.bias = nn.Parameter(torch.cat([b.detach() for b in biases]), requires_grad=False)
        self.sizes = sizes
        self.fed = False  # by a fused norm: its input is quantized already
        self._traced_input = self._traced_quantized = self._traced_output = None
        self._set_keys()
        self.train(first.training)
        self.prepack()

    def _set_keys(self) -> None:
        number = next(_numbers)
        self.output_key, self.quantized_key = f"_flexq_output_{number}", f"_flexq_quantized_{number}"

    def feed(self, stand_in: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """The tensor that the parts will be called with, which now carries their quantized input."""
        if torch.compiler.is_compiling():
            self._traced_input, self._traced_quantized, self._traced_output = stand_in, quantized, None
        else:
            setattr(stand_in, self.quantized_key, quantized)
        return stand_in

    def output_for(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """The output [..., N] of all parts for x, computed when the first of them asks, forgotten with the last.

        Each part gets it once, and none after x has been written to, as far as PyTorch counts that, which it does not
        in inference mode."""
        is_last = part == len(self.sizes) - 1
        if torch.compiler.is_compiling():
            return self._output_while_tracing(x, is_last)
        version = None if x.is_inference() else x._version
        output, of, asked = getattr(x, self.output_key, None) or (None, version, frozenset())
        if output is None or of != version or part in asked:
            output, asked = self._compute(x, getattr(x, self.quantized_key, None)), frozenset()
        setattr(x, self.output_key, None if is_last else (output, version, asked | {part}))
        return output

    def _output_while_tracing(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        """The same with what is remembered on the module: the tracer does not know of tensors' attributes, and what is
        on the module during a trace is gone from the graph."""
        if self._traced_input is not x:
            self._traced_input, self._traced_quantized, self._traced_output = x, None, None
        output = self._traced_output
        if output is None:
            output = self._compute(x, self._traced_quantized)
        self._traced_output = output
        if is_last:
            self._traced_input = self._traced_quantized = self._traced_output = None
        return output

    def _compute(self, x: torch.Tensor, quantized: torch.Tensor | None) -> torch.Tensor:
        """The output [..., N] for x, of which `quantized` is the quantized form if a fused norm has made it.

        Raises:
            RuntimeError: x should come from a fused norm, and does not.
        """
        if quantized is not None:
            y = gemm(self, quantized, x.numel() // x.shape[-1], x.dtype)
            return without_gradient(y.view(*x.shape[:-1], self.out_features), x)
        if self.fed:
            raise RuntimeError(
                "layers that a fused norm feeds were called with another tensor than the norm returned; call "
                "flexq.unfuse_model(model), or load it without fusing"
            )
        return self(x)

    def rows(self, index: int) -> slice:
        begin = sum(self.sizes[:index])
        return slice(begin, begin + self.sizes[index])

    def part_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """One layer's canonical tensors, and bias if it had one."""
        planes, scales = self.canonical()
        rows = self.rows(index)
        tensors = {"qweight": planes[rows], "scales": scales[rows]}
        return tensors | {"bias": self.bias.detach()[rows]} if self.has_bias[index] else tensors

    def split(self) -> Iterator[Linear]:
        """The layers again."""
        for index, size in enumerate(self.sizes):
            tensors = {name: tensor.clone() for name, tensor in self.part_tensors(index).items()}
            like = nn.Linear(self.in_features, size, bias=False, device="meta", dtype=self.weight_dtype)
            layer = Linear.from_canonical(tensors["qweight"], tensors["scales"], like, self.config)
            if "bias" in tensors:
                layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)
            yield layer.train(self.training)

    # Its parts save and load, each under the name of its layer.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        pass

    def __setstate__(self, state):
        super().__setstate__(state)
        self._set_keys()  # a copy's parts look for its own outputs


class MergedPart(nn.Module):
    """One layer's share of a `MergedLinear`: some of its outputs. The part that is called first owns it."""

    is_flexq_layer = True

    def __init__(self, merged: MergedLinear, index: int):
        super().__init__()
        if index == 0:
            self.merged = merged
        else:
            self.__dict__["merged"] = merged  # a module's child elsewhere: not this one's too
        self.index = index
        self.in_features, self.out_features = merged.in_features, merged.sizes[index]
        rows = merged.rows(index)
        self.begin, self.end = rows.start, rows.stop

    @property
    def config(self) -> LayerConfig:
        return self.merged.config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.output_for(x, self.index)[..., self.begin : self.end]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, part={self.index}"

    # Names and tensors as of the layer that was here.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        note_meaning(destination, prefix, self.config)
        for name, tensor in self.merged.part_tensors(self.index).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if not is_meant(local_metadata, prefix, self.config, errors):
            return
        merged = self.merged
        merged._unprepack()
        for name, own in merged.part_tensors(self.index).items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing += [prefix + name] if strict else []
            elif given.shape != own.shape or (name != "bias" and given.dtype != own.dtype):
                errors.append(
                    f"{prefix}{name} must be {own.dtype} {list(own.shape)}, got {given.dtype} {list(given.shape)}"
                )
            else:
                with torch.no_grad():
                    own.copy_(given)
        if self.index == len(merged.sizes) - 1:
            merged.prepack()


def gemm(layer: Linear, quantized: torch.Tensor, m: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, N] from an activation quantized for `layer`."""
    c = layer.config
    return torch.ops.flexq.gemm(
        quantized, layer._packed, layer.bias, m, layer.out_features, layer.in_features, c.act_bits, c.scheme,
        c.rotation, dtype, c.weight_bits,
    )  # fmt: skip


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return output.clone()  # not a view, which must not be written to

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        raise RuntimeError("fused layers pass no gradients; call flexq.unfuse_model(model) before training adapters")


def without_gradient(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a fused kernel made of x: a backward pass through it is an error, not silence."""
    return _WithoutGradient.apply(output, x) if x.requires_grad and torch.is_grad_enabled() else output


def merge(
    model: nn.Module, calls: dict[str, Call], alone: set[str], inputs: set[int], merged_names: list[list[str]]
) -> None:
    """Merge layers that share an input.

    Args:
        model: changed in place.
        calls: of `tracing.once`.
        alone: layers that become a merged one of a single part if they share with none.
        inputs: identities of tensors whose readers do too.
        merged_names: the names of the layers in each merged one go there as they are done.
    """
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    places = Counter(child for module in model.modules() for child in module.children())
    for name, call in calls.items():
        if type(call.module) is Linear and call.x is not None and places[call.module] == 1:
            groups[id(call.x), call.module.config, call.module.in_features].append(name)
    for (x, _, _), names in groups.items():
        if len(names) > 1 or x in inputs or names[0] in alone:
            merged = MergedLinear([calls[name].module for name in names])
            for index, name in enumerate(names):
                replace_module(model, name, MergedPart(merged, index))
            merged_names.append(names)


def unmerge(model: nn.Module, merged_names: list[list[str]]) -> None:
    for names in merged_names:
        merged = model.get_submodule(names[0]).merged
        for name, layer in zip(names, merged.split(), strict=True):
            replace_module(model, name, layer)
    merged_names.clear()


def merged_at(module: nn.Module) -> MergedLinear | None:
    """What a module hands its input to."""
    return module.merged if isinstance(module, MergedPart) else module.__dict__.get("flexq_gate_up")
