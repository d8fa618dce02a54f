"""Zero-shot multiple choice: reading files, log likelihoods, accuracy."""

import json

import pytest
import torch
from flexq.evaluate.zero_shot import Question, log_likelihoods, read_questions, score


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": list(text.encode())})


@pytest.fixture
def model(tiny_llama):
    tiny_llama.resize_token_embeddings(256)
    return tiny_llama


def test_forms(tmp_path):
    lines = [
        {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1},
        {"question": "2 + 2 =", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "2 + 2 =", "choices": ["3", "4"], "answer": "4"},
        {"question": "2 + 2 =", "choices": ["3", "4"], "answer": "B"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "q.json").write_text(json.dumps(lines))
    expected = [Question("2 + 2 =", ("3", "4"), 1)] * 4
    assert read_questions(tmp_path / "q.jsonl") == read_questions(tmp_path / "q.json") == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("", "holds no questions"),
        (json.dumps({"question": "?", "choices": ["a", "b"]}), "question 1: no .answer."),
        (json.dumps({"question": "?", "choices": ["a", "b"], "answer": 2}), "answer 2 of 2 choices"),
        (json.dumps({"question": "?", "choices": ["a"], "answer": 0}), "answer 0 of 1 choices"),
        (json.dumps({"question": "?", "choices": ["a", "b"], "answer": "BC"}), "answer 'BC' is neither a choice nor"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "q").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q")


def test_log_likelihood_is_that_of_the_answers_tokens(model):
    question = Question("ab", ("c", "de"), 0)
    values = log_likelihoods(model, Bytes(), question)
    for value, choice in zip(values, question.choices, strict=True):
        ids = torch.tensor([list(f"ab {choice}".encode())])
        with torch.inference_mode():
            log_p = model(ids).logits[0].log_softmax(-1)
        expected = sum(log_p[i - 1, ids[0, i]].item() for i in range(2, ids.shape[1]))
        assert value == pytest.approx(expected, abs=1e-4)


def test_accuracy(model):
    tokenizer = Bytes()
    questions = [Question(q, ("x", "a longer answer", "yy"), 0) for q in ("one", "two", "three")]
    best = [max(range(3), key=log_likelihoods(model, tokenizer, q).__getitem__) for q in questions]
    right = [Question(q.question, q.choices, b) for q, b in zip(questions, best, strict=True)]
    wrong = [Question(q.question, q.choices, (b + 1) % 3) for q, b in zip(questions, best, strict=True)]
    (result,) = score({"m": model}, tokenizer, [*right, wrong[0]])
    assert result.questions == 4 and result.accuracy == 0.75
    assert 0 <= result.accuracy_normalized <= 1
