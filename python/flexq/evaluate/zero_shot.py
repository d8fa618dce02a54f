"""Zero-shot multiple choice on local files: which answer the model finds likeliest, for its length."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq.progress import Progress
from flexq.quantize.inputs import logits

FORMS = (
    'a line of JSON each: {"question": str, "choices": [str, ...] or {"text": [...], "label": [...]}, '
    '"answer": index or label}'
)


@dataclass(frozen=True)
class Question:
    """A question, its possible answers, and which one is right (an index)."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass
class Score:
    """A model on a set of questions.

    Args:
        name: of the model.
        questions: how many.
        accuracy: share of questions whose right answer has the largest log likelihood.
        accuracy_normalized: the same by log likelihood over the answer's bytes, so that short ones have no advantage.
        error: standard error of `accuracy_normalized`.
    """

    name: str
    questions: int
    accuracy: float
    accuracy_normalized: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a JSON Lines file, or of a JSON file with a list of them.

    Raises:
        ValueError: a question that is not of the form, with its number and what is wrong.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        items = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; it must hold {FORMS}") from None
    questions = []
    for number, item in enumerate(items, 1):
        try:
            questions.append(_question(item))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, question {number}: {why}; it must hold {FORMS}") from None
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def _question(item: Mapping[str, Any]) -> Question:
    choices, labels = item["choices"], None
    if isinstance(choices, Mapping):
        choices, labels = choices["text"], list(choices.get("label", ())) or None
    choices = tuple(str(choice) for choice in choices)
    answer = item.get("answer", item.get("answerKey"))
    if answer is None:
        raise KeyError("answer")
    if isinstance(answer, str) and labels is not None:
        answer = labels.index(answer)
    elif isinstance(answer, str):
        if answer not in choices and (len(answer) != 1 or answer not in "ABCDEFGHIJ"):
            raise ValueError(f"answer {answer!r} is neither a choice nor a letter from A to J")
        answer = choices.index(answer) if answer in choices else "ABCDEFGHIJ".index(answer)
    if len(choices) < 2 or not 0 <= int(answer) < len(choices):
        raise ValueError(f"answer {answer} of {len(choices)} choices")
    return Question(str(item["question"]), choices, int(answer))


@torch.inference_mode()
def log_likelihoods(model: nn.Module, tokenizer, question: Question) -> list[float]:
    """Of each choice after the question and a space, in nats: the sum over its tokens."""
    device = next(model.parameters()).device
    context = tokenizer(question.question).input_ids
    values = []
    for choice in question.choices:
        ids = tokenizer(f"{question.question} {choice}").input_ids
        shared = next((i for i, (a, b) in enumerate(zip(context, ids, strict=False)) if a != b), len(context))
        begin = max(1, min(shared, len(ids) - 1))
        tokens = torch.tensor([ids], device=device)
        log_p = logits(model, tokens)[0, begin - 1 : -1].float().log_softmax(-1)
        values.append(log_p.gather(1, tokens[0, begin:, None]).sum().item())
    return values


def score(
    models: dict[str, nn.Module], tokenizer, questions: Sequence[Question], progress: Progress | None = None
) -> list[Score]:
    """Each model's accuracy.

    Args:
        models: by name; they share the tokenizer.
        tokenizer: of all of them.
        questions: as `read_questions` reads them.
        progress: wraps the loop over models and questions.

    Raises:
        ValueError: logits that are not finite.
    """
    steps = [(name, question) for name in models for question in questions]
    right: dict[str, list[tuple[bool, ...]]] = {name: [] for name in models}
    for name, question in progress(steps) if progress else steps:
        values = log_likelihoods(models[name], tokenizer, question)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} gives logits that are not finite on {question.question[:60]!r}")
        by_byte = [v / max(len(c.encode()), 1) for v, c in zip(values, question.choices, strict=True)]
        right[name].append(tuple(v.index(max(v)) == question.answer for v in (values, by_byte)))
    results = []
    for name, each in right.items():
        n = len(each)
        plain, normalized = (sum(flags) / n for flags in zip(*each, strict=True))
        results.append(Score(name, n, plain, normalized, (normalized * (1 - normalized) / n) ** 0.5))
    return results
