"""`LLM.generate` against transformers on the same checkpoint; tensor parallelism; quantizing on the way; what is
refused."""

import json
import re
import shutil
from pathlib import Path

import flexq
import pytest
import torch
from engines import assert_same, engine, greedy, random_model, shut
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "2 + 2 =",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Water boils at",
    "def fibonacci(n):\n",
]


def assert_same_as_transformers(folder, results, prompts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert_same(folder, [tokenizer(prompt).input_ids for prompt in prompts], results)


def test_smollm_as_in_transformers(smollm, own_process):
    llm = engine(smollm)
    try:
        together = greedy(llm, PROMPTS)
        alone = [greedy(llm, [prompt])[0] for prompt in PROMPTS[:2]]
        assert_same_as_transformers(smollm, together, PROMPTS)
        assert_same_as_transformers(smollm, alone, PROMPTS[:2])
        # More prompts than fit in a batch, of many lengths: continuous batching.
        many = [" ".join(["word"] * (1 + 7 * i % 60)) for i in range(40)]
        assert [len(tokens) for tokens, _ in greedy(llm, many, 5)] == [5] * 40
    finally:
        shut(llm)


@pytest.mark.parametrize("size", [1, 2])
def test_tensor_parallel_and_mixed_plans(random_mixed, size, monkeypatch):
    if size > 1:  # vLLM wants a NUMA node for each rank unless it is told their cores
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(rank) for rank in range(size)))
    llm = engine(random_mixed, tensor_parallel_size=size)
    try:
        assert_same_as_transformers(random_mixed, greedy(llm, PROMPTS), PROMPTS)
    finally:
        shut(llm)


LLAMA4 = {
    "intermediate_size_mlp": 512, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 3,
    "moe_layers": [], "attention_chunk_size": 256, "use_qk_norm": False, "no_rope_layers": [1, 1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("phi3", {}), ("qwen3", {}), ("mixtral", {}), ("stablelm", {}), ("llama4_text", LLAMA4)],
)
def test_architectures(random_float, tmp_path, kind, settings):
    """Layers that are merged on disk already, norms of queries and keys, experts in floating point; merged layers of
    which the class does not say so, and rows that the class puts in another order."""
    tokenizer = AutoTokenizer.from_pretrained(random_float)
    skip = ["*.experts"] if kind == "mixtral" else ()
    model = flexq.quantize_model(random_model(kind, len(tokenizer), **settings), "w6a8", skip=skip)
    flexq.save_model(model, tmp_path / "model", tokenizer)
    llm = engine(tmp_path / "model")
    try:
        assert_same_as_transformers(tmp_path / "model", greedy(llm, PROMPTS[:3]), PROMPTS[:3])
    finally:
        shut(llm)


def test_quantizes_a_float_checkpoint(random_float, tmp_path):
    llm = engine(random_float, quantization="flexq")
    try:
        results = greedy(llm, PROMPTS)
    finally:
        shut(llm)
    flexq.quantize_checkpoint(random_float, tmp_path / "w6a8", "w6a8")
    assert_same_as_transformers(tmp_path / "w6a8", results, PROMPTS)


@pytest.fixture(scope="module")
def mixtures(random_float, tmp_path_factory):
    """Folders of random mixture-of-experts models, in floating point, by kind."""
    tokenizer = AutoTokenizer.from_pretrained(random_float)
    settings = {
        "mixtral": {},
        "qwen3_moe": {"moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2},
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    folders = {}
    for kind, values in settings.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        random_model(kind, len(tokenizer), **values).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


def use_cores(size: int, monkeypatch) -> None:
    if size > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(rank) for rank in range(size)))


@pytest.mark.parametrize(("kind", "size"), [("mixtral", 1), ("qwen3_moe", 2), ("gpt_oss", 1)])
def test_quantizes_experts_on_the_way(mixtures, tmp_path, kind, size, monkeypatch):
    """Each device quantizes its part of each expert."""
    use_cores(size, monkeypatch)
    llm = engine(mixtures[kind], quantization="flexq", tensor_parallel_size=size)
    try:
        results = greedy(llm, PROMPTS[:3])
    finally:
        shut(llm)
    flexq.quantize_checkpoint(mixtures[kind], tmp_path / "w6a8", "w6a8")
    assert_same_as_transformers(tmp_path / "w6a8", results, PROMPTS[:3])


@pytest.mark.parametrize(
    ("kind", "scheme", "size", "by_expert"),
    [
        ("mixtral", "group", 1, False),
        ("qwen3_moe", "group", 2, False),
        ("mixtral", "channel", 1, False),
        ("qwen3_moe", "group", 2, True),
        ("gpt_oss", "group", 1, False),
    ],
)
def test_serves_quantized_experts(mixtures, tmp_path, kind, scheme, size, by_expert, monkeypatch):
    """A checkpoint's experts: all here, each device a part of each, or each device some of them. vLLM has other
    names for those of gpt-oss."""
    use_cores(size, monkeypatch)
    plan = flexq.Plan(flexq.LayerConfig(scheme=scheme))
    flexq.quantize_checkpoint(mixtures[kind], tmp_path / "model", plan)
    llm = engine(tmp_path / "model", tensor_parallel_size=size, enable_expert_parallel=by_expert)
    try:
        results = greedy(llm, PROMPTS[:3])
    finally:
        shut(llm)
    assert_same_as_transformers(tmp_path / "model", results, PROMPTS[:3])


def test_merged_layers_share_a_width():
    """vLLM has one tensor for q, k and v."""
    from flexq.integrations.vllm import FlexQVllmConfig
    from vllm.model_executor.layers.linear import LinearBase

    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    plan = flexq.Plan(layers={name: flexq.LayerConfig(weight_bits=b) for name, b in zip(names, (6, 5, 6), strict=True)})
    config = FlexQVllmConfig(plan)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = LinearBase.__new__(LinearBase)
    with pytest.raises(ValueError, match="it gives group 6 bits, group 5 bits, group 6 bits"):
        config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")


def test_layers_without_a_place_are_refused():
    """vLLM's classes may leave out what they do not know; blocks of other devices are nobody's fault."""
    from flexq.integrations.vllm import FlexQVllmConfig
    from vllm.model_executor.layers.linear import LinearBase

    names = [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.2.mlp.up_proj",
        "lm_head",
    ]
    config = FlexQVllmConfig(flexq.Plan(layers=dict.fromkeys(names, flexq.LayerConfig())))
    config.packed_modules_mapping = {}
    config.get_quant_method(LinearBase.__new__(LinearBase), names[0])
    with pytest.raises(
        ValueError, match=r"has quantized model\.layers\.1\.mlp\.experts\.down_proj, which vLLM's class"
    ):
        config.check_all_placed()
    config.plan.layers[names[1]] = None
    config.check_all_placed()
    config.plan.layers["lm_head"] = None
    config.check_before_loading(torch.nn.Module(), is_whole=False)  # a drafter of one block
    with pytest.raises(ValueError, match=r"has quantized model\.layers\.2\.mlp\.up_proj, which vLLM's class"):
        config.check_before_loading(torch.nn.Module(), is_whole=True)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (".layers.1.mlp.up_proj", "layers.1.mlp.up_proj"),  # of a model without a name
        ("model.layers.1.mlp.up_proj", "layers.1.mlp.up_proj"),  # of a class with a head
        ("layers.1.mixer.in_proj", "layers.1.mamba.in_proj"),  # another name than the module's own
        ("bert.layer.0.attention.output.qkv_proj", "roberta.layer.0.attention.self.qkv_proj"),
        ("layers.1.o_proj", "layers.1.self_attn.o_proj"),
        ("layers.2.mixer.in_proj", None),
        ("layers.1.x.y", None),
    ],
)
def test_names_that_vllm_tells(asked, name):
    from flexq.integrations.vllm import FlexQVllmConfig
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    settings = {n: flexq.LayerConfig() for n in ("layers.1.a.y", "layers.1.b.y", *([name] if name else []))}
    config = FlexQVllmConfig(flexq.Plan(layers=settings))
    config.packed_modules_mapping = {}
    method = config.get_quant_method(LinearBase.__new__(LinearBase), asked)
    assert isinstance(method, UnquantizedLinearMethod) == (name is None)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate", "x.block_sparse_moe.router.layer", "a.mlp.gate.wg"])
def test_routers_stay(name):
    from flexq.integrations.vllm_names import stays_anyway

    assert stays_anyway(name) and not stays_anyway("model.layers.0.mlp.gate_proj")


def corrupt(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 0xFF
    file.write_bytes(content)


def from_the_future(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (folder / "config.json").write_text(json.dumps(config))


def without_a_tensor(folder: Path) -> None:
    """As `save_pretrained` writes it, without checksums, and with one of a merged layer's tensors gone."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    del tensors["model.layers.1.self_attn.k_proj.qweight"]
    save_file(tensors, file, metadata={"format": "pt"})


def of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 1024
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, "has changed since it was written"),
        (from_the_future, "format version 9; this FlexQ reads 1"),
        (without_a_tensor, "k_proj.qweight is missing"),
        (of_another_model, "does not fit"),
    ],
)
def test_damaged_checkpoints_are_refused(random_mixed, tmp_path, monkeypatch, damage, message):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # with another process the reason is in its output
    folder = Path(shutil.copytree(random_mixed, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(Exception, match=re.escape(message)):
        engine(folder)
