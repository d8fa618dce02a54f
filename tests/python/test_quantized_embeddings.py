"""Models whose token embedding is quantized: plans, tied LM heads, checkpoints, what is refused."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import flexq
import pytest
import torch
from architectures import architecture
from conftest import tiny_config
from flexq.checkpoint.layers import insert_layers
from flexq.checkpoint.verify import verify
from flexq.embedding import CONFIG
from flexq.planning.choose import plan_of
from flexq.planning.mixed import Mixed, bytes_beside
from flexq.quantize.embeddings import scaling_of
from flexq.quantize.layers import input_embeddings, linear_bytes, shared_copy
from flexq.quantize.report import coverage
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

PLAN = flexq.Plan.uniform(embeddings=8)
IDS = torch.arange(3, 19).view(2, 8)
WINDOWS = [torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)]
NAME = "model.embed_tokens"
HEAD = flexq.LayerConfig(weight_bits=8, scheme="channel")


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def with_float_rows(model):
    """The model with what its embedding dequantizes to in its place."""
    copied, quantized = shared_copy(model), input_embeddings(model)
    rows = nn.Embedding.from_pretrained(quantized.dequantize(quantized.weight_dtype))
    copied.set_input_embeddings(rows)
    return copied


@pytest.mark.parametrize("tied", (True, False))
def test_model_in_memory(tied):
    model = llama(tied)
    size = model.model.embed_tokens.weight.numel()
    flexq.quantize_model(model, PLAN)
    embedding = input_embeddings(model)
    assert type(embedding) is flexq.Embedding and embedding.config == CONFIG
    assert model.flexq_plan.embeddings == 8 and model.flexq_plan.layers[NAME] == CONFIG
    assert (model.flexq_plan.layers.get("lm_head"), isinstance(model.lm_head, flexq.Linear)) == (
        HEAD if tied else None,
        tied,
    )
    assert not model.config.tie_word_embeddings
    other = with_float_rows(model)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), other.generate(IDS, **settings))
    found = coverage(model)
    assert (found.quantized_embeddings, found.embeddings) == (size, 0 if tied else size) and found.share_inside > 0.99
    layers = [m for m in model.modules() if isinstance(m, flexq.Linear)]
    assert linear_bytes(model)[0] == sum(m.stored_bytes for m in layers)


@pytest.mark.parametrize("tied", (True, False))
def test_checkpoints_by_every_way(tied, tmp_path):
    llama(tied).save_pretrained(tmp_path / "float")
    model = flexq.quantize_model(llama(tied), PLAN)
    expected = model(IDS).logits
    flexq.save_model(model, tmp_path / "memory")
    model.save_pretrained(tmp_path / "transformers")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", PLAN)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=flexq.FlexQConfig(PLAN))
    assert torch.equal(loaded(IDS).logits, expected)
    loaded.save_pretrained(tmp_path / "on the fly")
    written = tensors(tmp_path / "memory")
    head = {"lm_head.qweight", "lm_head.scales"} if tied else {"lm_head.weight"}
    assert {n for n in written if ".layers." not in n} == {
        f"{NAME}.qweight", f"{NAME}.scales", "model.norm.weight", *head,
    }  # fmt: skip
    for name in ("memory", "transformers", "disk", "on the fly"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["quantization_config"]["format_version"] == 2 and not config["tie_word_embeddings"]
        assert verify(tmp_path / name).keys and verify(tmp_path / name).plan_is_bound
        found = tensors(tmp_path / name)
        assert found.keys() == written.keys() and all(torch.equal(found[n], t) for n, t in written.items()), name
        again = flexq.load_model(tmp_path / name)
        assert type(input_embeddings(again)) is flexq.Embedding and torch.equal(again(IDS).logits, expected), name


@pytest.mark.parametrize("tied", (True, False))
def test_calibrated_in_memory_and_from_disk(tied, tmp_path):
    llama(tied).save_pretrained(tmp_path / "float")
    model = flexq.calibrate_model(llama(tied), WINDOWS, PLAN)
    flexq.save_model(model, tmp_path / "memory")
    done = flexq.calibrate_checkpoint(tmp_path / "float", tmp_path / "disk", WINDOWS, PLAN)
    assert done == replace(model.flexq_plan, produced_by=done.produced_by) and done.layers[NAME] == CONFIG
    of_memory, of_disk = tensors(tmp_path / "memory"), tensors(tmp_path / "disk")
    assert of_memory.keys() == of_disk.keys() and all(torch.equal(of_disk[n], t) for n, t in of_memory.items())
    rounded = tensors_of(flexq.quantize_model(llama(tied), PLAN))
    assert torch.equal(of_disk[f"{NAME}.qweight"], rounded[f"{NAME}.qweight"])
    assert torch.equal(flexq.load_model(tmp_path / "disk")(IDS).logits, model(IDS).logits)


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if name.startswith(NAME)}


def test_plans_say_it(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["embeddings"] == 8
    assert flexq.Plan.load(tmp_path / "plan.json") == PLAN
    assert "embeddings" not in flexq.Plan.uniform().to_dict()
    for wrong in (6, 8.0, True, "8"):
        with pytest.raises(ValueError, match=f"embeddings must be 8, or none to leave them as they are, got {wrong!r}"):
            flexq.Plan.from_dict(PLAN.to_dict() | {"embeddings": wrong})
    # A checkpoint's plan, with every name, does the same again.
    recorded = flexq.quantize_model(llama(True), PLAN).flexq_plan
    assert flexq.quantize_model(llama(True), recorded).flexq_plan == recorded
    assert plan_of(flexq.quantize_model(llama(True), recorded), [], {}).layers[NAME] == CONFIG


def test_plans_that_say_something_else():
    named = {NAME: flexq.LayerConfig(weight_bits=8)}
    for plan, message in (
        (flexq.Plan(layers=named), f"plan names '{NAME}', the token embedding; \"embeddings\": 8 quantizes it"),
        (replace(PLAN, layers={NAME: None}), f"plan has 8 bits for embeddings, and other settings for '{NAME}'"),
        (replace(PLAN, layers={NAME: flexq.LayerConfig()}), "plan has 8 bits for embeddings, and other settings"),
        (replace(PLAN, layers={"lm_head": None}), f"embedding {NAME} and lm_head share a weight"),
    ):
        model = llama(True)
        with pytest.raises(ValueError, match=message):
            flexq.quantize_model(model, plan)
        assert type(input_embeddings(model)) is nn.Embedding and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(ValueError, match="share a weight"):
        flexq.quantize_model(llama(True), PLAN, include=["*.mlp.*"])
    with pytest.raises(ValueError, match=f"embedding {NAME} is quantized already"):
        flexq.quantize_model(flexq.quantize_model(llama(True), PLAN), PLAN)


def test_a_tied_head_may_have_its_own_settings():
    plan = replace(PLAN, layers={"lm_head": flexq.LayerConfig(weight_bits=6)})
    assert flexq.quantize_model(llama(True), plan).lm_head.config == flexq.LayerConfig(weight_bits=6)


def test_weights_that_are_not_finite_leave_the_model_as_it_was(tmp_path):
    model = llama(False)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 7] = torch.inf
    for quantize in (flexq.quantize_model, lambda m, plan: flexq.calibrate_model(m, WINDOWS, plan)):
        with pytest.raises(ValueError, match=rf"embedding {NAME}: weight\[5\]\[7\] is inf"):
            quantize(model, PLAN)
        assert type(input_embeddings(model)) is nn.Embedding and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=NAME):
        flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", PLAN)
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize(
    "name",
    ("bert-base", "bert-MaskedLM", "gemma3_text-CausalLM", "gpt2-CausalLM", "opt-CausalLM", "gemma3-ImageTextToText"),
)
def test_other_models(name, tmp_path):
    model = architecture(name).model()
    given = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    model.save_pretrained(tmp_path / "float")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", PLAN)
        flexq.quantize_model(model, PLAN)
    embedding = input_embeddings(model)
    (own,) = {n for n, m in model.named_modules() if isinstance(m, flexq.Embedding)}
    others = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert others == given.keys() - {own} and embedding.padding_idx == given[own].padding_idx
    y, before = embedding(IDS), given[own](IDS)
    assert (y - before).norm() < 0.01 * before.norm()
    assert verify(tmp_path / "disk").keys
    loaded = input_embeddings(flexq.load_model(tmp_path / "disk"))
    assert torch.equal(loaded(IDS), y) and loaded.embed_scale == embedding.embed_scale


def test_scaled_rows_are_those_of_the_model():
    model = architecture("gemma3_text-CausalLM").model().to(torch.bfloat16)
    given = input_embeddings(model)
    embedding = input_embeddings(flexq.quantize_model(model, PLAN))
    assert embedding.embed_scale == pytest.approx(128**0.5) and embedding.rounds_scale
    with torch.no_grad():
        given.weight.copy_(embedding.dequantize(torch.bfloat16))
    assert torch.equal(embedding(IDS), given(IDS))


@pytest.mark.parametrize("name", ("bart-Seq2SeqLM", "t5-Seq2SeqLM", "marian-Seq2SeqLM"))
def test_shared_embeddings_are_refused(name, tmp_path):
    model = architecture(name).model()
    model.save_pretrained(tmp_path / "float")
    for quantize in (
        lambda: flexq.quantize_model(model, PLAN),
        lambda: flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", PLAN),
    ):
        with pytest.raises(ValueError, match="has the same weight; only an LM head may share it"):
            quantize()
    assert not (tmp_path / "disk").exists()


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.layer_norm(super().forward(ids), (self.embedding_dim,))


class Decoupled(nn.Embedding):
    """Ids from 8 on are another embedding's."""

    def __init__(self):
        super().__init__(8, 4)
        self.more = nn.Embedding(2, 4)

    def forward(self, ids):
        return torch.where(
            (ids < 8).unsqueeze(-1), super().forward(ids.clamp(max=7)), self.more((ids - 8).clamp(min=0))
        )


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Renamed(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(8, 4, max_norm=1.0), r"its lookups change it \(max_norm 1.0\)"),
        (Normed(8, 4), "Normed does more than look up rows and multiply them with embed_scale"),
        (Decoupled(), "Decoupled does more than look up rows"),
        (nn.Linear(4, 8), "it must be an nn.Embedding, got Linear"),
        (flexq.Embedding(8, 4), "embedding e is quantized already"),
    ],
)
def test_embeddings_that_cannot_be_quantized(module, message):
    with pytest.raises(ValueError, match=message):
        scaling_of("e", module)


def test_embeddings_that_can():
    assert scaling_of("e", nn.Embedding(8, 4, padding_idx=7, sparse=True)) == (None, False)
    assert scaling_of("e", Renamed(8, 4, padding_idx=7)) == (None, False)
    assert scaling_of("e", Scaled(8, 4)) == (3.0, False)
    assert scaling_of("e", Scaled(8, 4, device="meta", dtype=torch.bfloat16)) == (3.0, False)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, "format version 1, which has no quantized embeddings"),
        (3, "FlexQ format version 3; this FlexQ reads 1 and 2"),
    ],
)
def test_other_versions_of_the_format(version, message, tmp_path):
    flexq.save_model(flexq.quantize_model(llama(False), PLAN), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = version
    file.write_text(json.dumps(config))
    for read in (flexq.load_model, verify):
        with pytest.raises(flexq.ModelError, match=message):
            read(tmp_path / "out")


def test_a_checkpoint_whose_embedding_is_another():
    for config in (HEAD, replace(CONFIG, weight_bits=6)):
        with pytest.raises(ValueError, match=f"plan has embedding '{NAME}' as .*, and only .* is known"):
            insert_layers(llama(False), flexq.Plan(layers={NAME: config}, embeddings=8))
    with pytest.raises(ValueError, match=f"plan names layer '{NAME}', which is a Embedding"):
        insert_layers(llama(False), flexq.Plan(layers={NAME: CONFIG}))


@pytest.mark.parametrize("tied", (True, False))
def test_other_classes_load_it(tied, tmp_path):
    """The base model, and one with another head."""
    model = flexq.quantize_model(llama(tied), PLAN)
    flexq.save_model(model, tmp_path / "out")
    expected = model.model(IDS).last_hidden_state
    base = AutoModel.from_pretrained(tmp_path / "out")
    assert type(base.embed_tokens) is flexq.Embedding and torch.equal(base(IDS).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert torch.equal(classifier.model(IDS).last_hidden_state, expected)


def test_fused_and_trained_beside():
    """Fusing sees the embedding, and gradients pass to what comes after it."""
    model = flexq.quantize_model(llama(True), PLAN)
    before = model(IDS).logits
    assert flexq.fuse_model(model).merged and torch.equal(model(IDS).logits, before)
    flexq.unfuse_model(model)
    model.enable_input_require_grads()
    norm = model.model.layers[0].input_layernorm.weight
    model(IDS).logits.sum().backward()
    assert norm.grad is not None and norm.grad.norm() > 0


def test_older_checkpoints_load_as_before(tmp_path):
    model = flexq.quantize_model(llama(True))
    flexq.save_model(model, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 1 and "embeddings" not in settings["plan"]
    assert torch.equal(flexq.load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", (True, False))
def test_budgets_of_bytes_count_it(tied, tmp_path):
    model = llama(tied)
    mixed = Mixed.of(model, WINDOWS, PLAN)
    chosen = mixed.at_bits(5.0)
    plan = mixed.plan_at(chosen)
    assert plan.embeddings == 8
    layers = sum(layer.bytes[chosen.bits[layer.name]] for layer in mixed.ranking)
    quantized = flexq.quantize_model(llama(tied), plan)
    flexq.save_model(quantized, tmp_path / "out")
    stored = sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert stored == layers + mixed.fixed_bytes + bytes_beside(model, mixed.plan, mixed.resolved)
