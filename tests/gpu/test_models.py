"""Whole models on a GPU: fused, compiled, in CUDA graphs, with other caches. Skipped where there is no GPU."""

import sys
from pathlib import Path

import flexq
import pytest
import torch
from flexq.bench import decode as bench_decode
from flexq.bench import report
from flexq.quantize import offload
from flexq.quantize.calibrate import calibrate_model
from flexq.quantize.equalize import equalize_model
from flexq.quantize.layers import shared_copy
from safetensors.torch import load_file
from test_gpu import unusable

sys.path.append(str(Path(__file__).parents[1] / "python"))
from architectures import ARCHITECTURES
from test_calibrate import model_of, windows
from test_fuse import IDS, MASK, needs_smollm2, random_model, smollm2

pytestmark = pytest.mark.skipif(bool(unusable()), reason=unusable() or "usable")


def tokens(model, **options) -> list[list[int]]:
    return model.generate(
        IDS.cuda(), attention_mask=MASK.cuda(), max_new_tokens=64, do_sample=False, eos_token_id=None, **options
    ).tolist()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS.to(model.device), attention_mask=MASK.to(model.device)).logits[MASK.bool()].float()


@pytest.mark.parametrize("kind", ("llama", "qwen3", "phi3", "gemma3_text"))
@pytest.mark.parametrize("scheme", ("group", "channel"))
def test_fused_as_unfused(kind, scheme):
    plan = flexq.Plan(flexq.LayerConfig(scheme=scheme))
    model = flexq.quantize_model(random_model(kind, torch.bfloat16).cuda(), plan)
    before, expected = logits(model), tokens(model)
    fusion = flexq.fuse_model(model)
    assert len(fusion.merged) == 4
    assert (logits(model) - before).norm() <= 0.02 * before.norm()
    agree = sum(a == b for x, y in zip(tokens(model), expected, strict=True) for a, b in zip(x, y, strict=True))
    assert agree >= 0.9 * sum(len(x) for x in expected)  # random weights: near ties are many
    flexq.unfuse_model(model)
    assert torch.equal(logits(model), before)


def test_compiled_with_a_static_cache():
    model = flexq.quantize_model(random_model("llama", torch.float32).cuda(), "w6a8")
    expected = tokens(model)
    flexq.fuse_model(model)
    assert tokens(model) == expected
    assert tokens(model, cache_implementation="static", disable_compile=True) == expected
    assert tokens(model, cache_implementation="static") == expected  # compiled, CUDA graphs


def mixture(kind: str, scheme: str):
    model = next(a for a in ARCHITECTURES if a.kind == kind).model().float().eval()
    return flexq.quantize_model(model, flexq.Plan(flexq.LayerConfig(scheme=scheme)))


@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("kind", ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text"))
def test_mixtures_of_experts_as_on_the_cpu(kind, scheme):
    model = mixture(kind, scheme)
    ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
        assert (model.cuda()(ids.cuda()).logits.cpu() - expected).norm() <= 0.05 * expected.norm()


def test_a_mixture_of_experts_in_cuda_graphs():
    """Compiled with a static cache, whatever the router chooses."""
    model = mixture("qwen3_moe", "group").cuda()
    ids = torch.randint(3, 250, (2, 10), generator=torch.Generator().manual_seed(0)).cuda()
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None,
    }  # fmt: skip
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


def ties(model, mask: torch.Tensor, expected: list[list[int]], got: list[list[int]]) -> list[float]:
    """Of each sequence that differs, by how much `model` prefers one of the two tokens where it first does."""
    gaps = []
    for row, (xs, ys) in enumerate(zip(expected, got, strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(xs, ys, strict=True)) if x != y), None)
        if at is None:
            continue
        seen = torch.cat([mask[row], mask.new_ones(at - mask.shape[1])])
        with torch.inference_mode():
            ids = torch.tensor([xs[:at]], device=mask.device)
            last = model(input_ids=ids, attention_mask=seen.unsqueeze(0)).logits[0, -1].float()
        gaps.append(abs(float(last[xs[at]] - last[ys[at]])))
    return gaps


@needs_smollm2
def test_greedy_text_of_smollm2_is_the_same_but_for_ties():
    # Norms and attention add up in another order when fused, compiled or with a static cache. A last bit can round a
    # quantized activation to the next code, and so decide between tokens that are about equally likely.
    model, batches, texts = smollm2(torch.float32, "w6a8", "cuda")
    expected = texts()
    flexq.fuse_model(model)
    static = {"cache_implementation": "static"}
    others = {"fused": texts(), "static": texts(**static, disable_compile=True), "compiled": texts(**static)}
    flexq.unfuse_model(model)
    for name, other in others.items():
        for batch, wanted, got in zip(batches, expected, other, strict=True):
            gaps = ties(model, batch.attention_mask, wanted, got)
            assert all(gap < 0.25 for gap in gaps), (name, gaps)


def test_compiles_as_one_graph():
    model = flexq.quantize_model(random_model("llama", torch.bfloat16).cuda())
    flexq.fuse_model(model)
    expected = logits(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        assert (logits(compiled) - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("cache", ("offloaded", "offloaded_static"))
def test_other_caches(cache):
    model = flexq.quantize_model(random_model("llama", torch.float32).cuda())
    expected = tokens(model)
    flexq.fuse_model(model)
    assert tokens(model, cache_implementation=cache, disable_compile=True) == expected


def test_quantized_while_loading_onto_the_gpu(tmp_path):
    model = random_model("llama", torch.bfloat16, num_hidden_layers=4, hidden_size=1024, intermediate_size=4096)
    model.save_pretrained(tmp_path)
    float_bytes = sum(p.nbytes for p in model.parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = type(model).from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cuda", quantization_config=flexq.FlexQConfig()
    )
    assert torch.cuda.max_memory_allocated() - before < 0.75 * float_bytes  # never the whole model in floating point
    reference = flexq.quantize_model(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).cuda())
    assert torch.equal(logits(loaded), logits(reference))


def test_bench_decode(monkeypatch):
    monkeypatch.setitem(
        bench_decode.SHAPES, "tiny", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
                                      "num_attention_heads": 4},
    )  # fmt: skip
    points = bench_decode.bench_decode("tiny", batches=[1], contexts=[16], prefills=[32])
    assert {p.contender for p in points} >= set(bench_decode.DEFAULT_CONTENDERS)
    assert all(p.milliseconds > 0 for p in points)
    assert "/ floor" in report.decode_table(points)


@pytest.mark.parametrize("model_on_the_gpu", (True, False))
def test_calibrates_as_on_the_cpu(model_on_the_gpu):
    text, reference = windows(), model_of("llama")
    on_cpu = calibrate_model(shared_copy(reference), text)
    codes = [on_cpu.model.layers[0].self_attn.q_proj.canonical()[0]]
    with torch.inference_mode():
        expected, outputs = reference(text[0]).logits, [on_cpu(text[0]).logits]
    if model_on_the_gpu:
        model = calibrate_model(shared_copy(reference).cuda(), text)
    else:  # its blocks go there one at a time
        model = calibrate_model(shared_copy(reference), text, device="cuda")
        assert not any(t.is_cuda for m in (model, reference) for t in (*m.parameters(), *m.buffers()))
    model.cpu()
    codes.append(model.model.layers[0].self_attn.q_proj.canonical()[0])
    with torch.inference_mode():
        outputs.append(model(text[0]).logits)
    # Sums in another order round a few codes otherwise, and then what comes after them. Roundings that had nothing in
    # common would differ by 1.4 of their error.
    assert (codes[0] == codes[1]).float().mean() > 0.95
    assert (outputs[0] - outputs[1]).norm() < (outputs[0] - expected).norm()


@pytest.mark.parametrize("kind", ("llama", "qwen3_moe"))
def test_calibrates_from_files_as_on_the_gpu(kind, tmp_path, monkeypatch):
    """Bit for bit, with embeddings, norms and head that come and go too."""
    monkeypatch.setattr(offload, "_SMALL_BYTES", 0)
    next(a for a in ARCHITECTURES if a.kind == kind).model().bfloat16().save_pretrained(tmp_path / "float")
    model = flexq.load_model(tmp_path / "float", device="cuda")
    text = [window.clamp(3, 90) for window in windows()]
    equalize_model(model, text)
    flexq.save_model(calibrate_model(model, text, "w6a8"), tmp_path / "whole")
    flexq.calibrate_checkpoint(tmp_path / "float", tmp_path / "parts", text, "w6a8", device="cuda", equalize=0.25)
    given, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
