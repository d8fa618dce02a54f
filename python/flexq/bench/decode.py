"""`flexq bench decode`: a decode step and a prefill of a whole model, against what else a PyTorch user could run."""

import contextlib
import functools
import gc
import importlib.util
import multiprocessing
import os
import queue
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from flexq.bench.models import CONTENDERS, CPU_CONTENDERS, DEFAULT_CONTENDERS, SHAPES, fits_shape, make_model
from flexq.bench.timing import read_bandwidth
from flexq.progress import Progress
from flexq.quantize.layers import name_of

DEFAULT_BATCHES = (1, 4, 8, 16, 64)
DEFAULT_CONTEXTS = (128, 4096)
DEFAULT_PREFILLS = (512, 4096)
_STEPS = 24  # that are timed, after as many unmeasured ones as compiling and capturing take
_WARMUP = 4
_CHUNK = 2048  # tokens of a prefill at a time, where only the cache's contents count


@dataclass
class DecodePoint:
    """One model at one batch and context.

    Args:
        shape, contender: which.
        batch, context: tokens a step, and already in the cache.
        milliseconds: of a decode step, or of a prefill of `context` tokens; median.
        prefill: which of the two.
        weight_bytes: of the whole model, embeddings and LM head included.
        peak_bytes: of GPU memory while it ran.
        floor_milliseconds: of a step: to read the weights that it reads, at the bandwidth measured in the same run.
        breakdown: of a step, microseconds by kind of kernel.
    """

    shape: str
    contender: str
    batch: int
    context: int
    milliseconds: float
    prefill: bool
    weight_bytes: int
    peak_bytes: int
    floor_milliseconds: float
    breakdown: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ModelBytes:
    """Of a model's weights.

    Args:
        total: of all.
        embeddings: of those that a decode step takes a row of, unless they are the LM head's too.
        experts: of the experts among them.
        chosen: experts that a token gets, of all there are.
    """

    total: int
    embeddings: int
    experts: int
    chosen: float

    def read(self, batch: int) -> float:
        """By a decode step of so many tokens, each of which chooses any experts."""
        share = 1 - (1 - self.chosen) ** batch
        return self.total - self.embeddings - self.experts * (1 - share)


def model_bytes(model: nn.Module) -> ModelBytes:
    quantized = {name: m for name, m in model.named_modules() if hasattr(m, "weight_bytes")}
    inside = tuple(f"{name}." for name in quantized)

    def size_of(root: str) -> int:
        """Of the weights below `root`, quantized ones as they are stored."""
        own = {
            id(p): p.numel() * p.element_size()
            for name, p in model.named_parameters()
            if name.startswith(root) and not name.startswith(inside)
        }
        outermost = (m for name, m in quantized.items() if f"{name}.".startswith(root) and not name.startswith(inside))
        return sum(own.values()) + sum(m.weight_bytes for m in outermost)

    embedding = model.get_input_embeddings()
    is_read = any(
        p is embedding.weight
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.startswith("lm_head.")
    )
    experts = [f"{name}." for name, _ in model.named_modules() if name.endswith(".experts")]
    config = model.config
    return ModelBytes(
        total=size_of(""),
        embeddings=0 if is_read else size_of(f"{name_of(model, embedding)}."),
        experts=sum(size_of(name) for name in experts),
        chosen=config.num_experts_per_tok / config.num_experts if experts else 1.0,
    )


class _Step:
    """A greedy decode step of a batch: the ids of the last tokens to those of the next ones."""

    def __init__(self, model: nn.Module, batch: int, context: int, compiled: bool, device: str):
        from transformers import StaticCache

        self.model, self.batch, self.device = model, batch, device
        self.cache = StaticCache(config=model.config, max_cache_len=context + 2 * (_STEPS + _WARMUP) + 16)
        self.ids = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self.position = torch.full((1, 1), context, dtype=torch.long, device=device)
        for begin in range(0, context, _CHUNK):
            length = min(_CHUNK, context - begin)
            ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
            positions = torch.arange(begin, begin + length, device=device).unsqueeze(0)
            model(input_ids=ids, past_key_values=self.cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        self.replay = None
        self.step = torch.compile(self._eager, fullgraph=True) if compiled and device != "cpu" else self._eager

    def _eager(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids, past_key_values=self.cache, position_ids=position, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    def _advance(self) -> None:
        self.ids.copy_(self.step(self.ids, self.position))
        self.position += 1

    def __call__(self) -> None:
        if self.device == "cpu":
            return self._advance()
        if self.replay is None:
            self.replay = _captured(self._advance)
        self.replay()


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one CUDA graph; it keeps `run`, whose tensors it reads."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return functools.partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, run: Callable[[], Any]) -> None:
    graph.replay()


def _milliseconds(run: Callable[[], None], times: int, device: str) -> float:
    """Median time of a call."""
    values = []
    for _ in range(times):
        if device == "cpu":
            begin = time.perf_counter()
            run()
            values.append(1e3 * (time.perf_counter() - begin))
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            values.append(begin.elapsed_time(end))
    return statistics.median(values)


_KINDS = (
    ("GEMM", ("gemm", "cutlass", "nvjet", "gemv", "splitk", "cublas", "reduce_kernel")),
    ("attention", ("flash", "fmha", "attention", "softmax", "sdpa")),
    ("quantization", ("quantize",)),
)


def _breakdown(run: Callable[[], None], steps: int) -> dict[str, float]:
    """Microseconds of a step by kind of kernel. The rest are inductor's and PyTorch's kernels between them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in _KINDS if any(word in name for word in words)), "other kernels")
        times[kind] = times.get(kind, 0.0) + event.self_device_time_total / steps
    return times


class _Alone:
    """The turns of a contender that is the only one at work."""

    def turn(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


@dataclass
class _SideBySide:
    """The turns of contenders in processes of their own: all have prepared a point when the first one is timed, and
    none prepares the next before the last one has been.

    Args:
        barrier: a multiprocessing barrier of all contenders.
        lock: a multiprocessing lock.
    """

    barrier: Any
    lock: Any

    @contextlib.contextmanager
    def turn(self):
        self.barrier.wait()
        with self.lock:
            yield
        self.barrier.wait()


def _contend(
    shape: str,
    name: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    prefills: Sequence[int],
    device: str,
    breakdown: bool,
    bandwidth: float,
    turns: "_Alone | _SideBySide",
    report: Callable[[DecodePoint], None],
) -> None:
    """The points of one contender; where it does not fit in memory, a warning says so, and it takes its turns without
    any."""
    on_gpu = device != "cpu"
    _clean(on_gpu)  # of the contender before
    torch.manual_seed(0)
    contender = CONTENDERS[name]
    model = None
    with contextlib.suppress(torch.OutOfMemoryError):  # bf16 where only fewer bits fit
        model = make_model(shape, contender, device, torch.bfloat16)
    if model is None:
        warnings.warn(f"{name} is left out: its weights do not fit in memory", stacklevel=2)
    sizes = model_bytes(model) if model is not None else None

    def time_point(prepare: Callable[[], Callable[[], None]], batch: int, context: int, prefill: bool, times: int):
        run = None
        _clean(on_gpu)
        with contextlib.suppress(torch.OutOfMemoryError):
            run = prepare() if model is not None else None
        milliseconds, shares = 0.0, {}
        with turns.turn():
            if run is not None:
                milliseconds = _milliseconds(run, times, device)
                first = (batch, context, prefill) == (batches[0], contexts[0], False)
                shares = _breakdown(run, 4) if on_gpu and breakdown and first else {}
        if run is None:
            if model is not None:
                what = f"prompt of {context}" if prefill else f"batch {batch} at context {context}"
                warnings.warn(f"{name}: {what} is left out, as it does not fit in memory", stacklevel=2)
            return
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        floor = 1e3 * sizes.read(batch if not prefill else context) / bandwidth
        report(DecodePoint(shape, name, batch, context, milliseconds, prefill, sizes.total, peak, floor, shares))

    def prepare_step(batch: int, context: int) -> Callable[[], None]:
        step = _Step(model, batch, context, contender.compiled, device)
        for _ in range(_WARMUP):
            step()
        return step

    def prepare_prefill(length: int) -> Callable[[], None]:
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        prefill = functools.partial(model, input_ids=ids, use_cache=False, logits_to_keep=1)
        prefill = _captured(prefill) if on_gpu else prefill
        prefill()
        return prefill

    for context in contexts:
        for batch in batches:
            prepare = functools.partial(prepare_step, batch, context)
            time_point(prepare, batch, context, False, _STEPS if on_gpu else 5)
    for length in prefills:
        time_point(functools.partial(prepare_prefill, length), 1, length, True, 5 if on_gpu else 2)


def _contend_apart(messages, shapes: dict[str, dict[str, int]], *args) -> None:
    """A contender's process: its points to the queue `messages`, and None at the end."""
    SHAPES.update(shapes)
    with torch.inference_mode():
        _contend(*args, messages.put)
    messages.put(None)


def _all_apart(contenders: Sequence[str], shape: str, *args) -> list[DecodePoint]:
    """`_contend` for each in a process of its own, at once; `args` are its arguments after the name, the last of them
    the report."""
    *args, report = args
    context = multiprocessing.get_context("spawn")
    turns = _SideBySide(context.Barrier(len(contenders)), context.Lock())
    messages = context.Queue()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(contenders))))
    processes = {
        name: context.Process(
            target=_contend_apart, args=(messages, SHAPES, shape, name, *args, turns), name=name, daemon=True
        )
        for name in contenders
    }
    points: list[DecodePoint] = []
    try:
        for process in processes.values():
            process.start()
        working = len(processes)
        while working:
            try:
                message = messages.get(timeout=1.0)
            except queue.Empty:
                failed = [name for name, process in processes.items() if process.exitcode not in (None, 0)]
                if failed:
                    raise RuntimeError(f"the process of {', '.join(failed)} failed; it said why above") from None
                continue
            if message is None:
                working -= 1
                continue
            points.append(message)
            report(message)
        for process in processes.values():
            process.join()
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()
    return sorted(points, key=lambda point: contenders.index(point.contender))


def bench_decode(
    shape: str = "llama-2-7b",
    contenders: Sequence[str] | None = None,
    batches: Sequence[int] = DEFAULT_BATCHES,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    prefills: Sequence[int] = DEFAULT_PREFILLS,
    device: str = "cuda",
    breakdown: bool = True,
    memory_limit: float | None = None,
    side_by_side: bool = False,
    progress: Progress | None = None,
    report: Callable[[DecodePoint], None] | None = None,
) -> list[DecodePoint]:
    """Time decode steps (greedy, static cache, CUDA graphs) and prefills of models of `shape` with random weights.

    Args:
        shape: one of SHAPES.
        contenders: of CONTENDERS; DEFAULT_CONTENDERS (on the CPU CPU_CONTENDERS), and Humming if it is installed, if
            None.
        batches, contexts: tokens a step, and in the cache before it. What does not fit in memory is left out, with a
            warning (side by side on stderr).
        prefills: lengths of prompts to time, batch 1.
        device: "cuda" or "cpu".
        breakdown: also profile a step at the first batch and context.
        memory_limit: bytes of GPU memory that may be used, of a card that has more. Not with side_by_side.
        side_by_side: contenders in processes of their own, which build and compile at the same time, and are timed one
            after the other while all the others wait. Much faster than one by one, where they fit in memory together.
        progress: wraps the loop over contenders, e.g. `tqdm.tqdm`; side by side it is not used.
        report: called with each point as soon as it is there.

    Raises:
        ValueError: an unknown shape or contender, or memory_limit with side_by_side.
        RuntimeError: the process of a contender failed.
    """
    chosen = bool(contenders)
    if not contenders:
        humming = ("Humming W6A8",) if importlib.util.find_spec("humming") is not None else ()
        contenders = CPU_CONTENDERS if device == "cpu" else DEFAULT_CONTENDERS + humming
    for name in contenders:
        if name not in CONTENDERS:
            raise ValueError(f"unknown contender {name!r}; known are {', '.join(CONTENDERS)}")
    without = [name for name in contenders if not fits_shape(shape, CONTENDERS[name])]
    if without and chosen:
        raise ValueError(f"{shape} has experts, for which {', '.join(without)} has no kernels")
    contenders = [name for name in contenders if name not in without]
    if side_by_side and memory_limit is not None:
        raise ValueError("memory_limit is of one contender at a time; side_by_side runs them all at once")
    on_gpu = device != "cpu"
    points: list[DecodePoint] = []

    def add(point: DecodePoint) -> None:
        points.append(point)
        if report is not None:
            report(point)

    if on_gpu and memory_limit is not None:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit / total))
    with torch.inference_mode():
        bandwidth = read_bandwidth(400_000_000 if on_gpu else 100_000_000, device)
        _clean(on_gpu)
        points_of = (batches, contexts, prefills, device, breakdown, bandwidth)
        if side_by_side:
            return _all_apart(list(contenders), shape, *points_of, report or (lambda point: None))
        for name in progress(contenders) if progress else contenders:
            _contend(shape, name, *points_of, _Alone(), add)
    if on_gpu and memory_limit is not None:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return points


def _clean(on_gpu: bool) -> None:
    torch._dynamo.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
