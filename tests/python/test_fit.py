"""Fitting the dispatcher's costs, on a model of a GPU that is made up; and what an operator costs the host."""

import json

import pytest
from flexq.bench.explain import Choice
from flexq.bench.fit import fit, parse, text_of
from flexq.cli import main

TRUE = {"bandwidth_share": 0.9, "launch_us": 3.0, "clocks": 400.0, "read": 1.1, "unused": 5.0}


def estimates(table: str, questions):
    """Two kernels: one reads weights, one is bound by arithmetic."""
    c = parse(table)
    answers = []
    for n, k, m, _, _ in questions:
        memory = c["read"] * n * k / 4e6
        answers.append(
            {
                "few": c["launch_us"] + max(memory, 4 * m * n * k * c["clocks"] / 1e13),
                "many": 2 * c["launch_us"] + max(1.2 * memory, m * n * k * c["clocks"] / 1e13),
            }
        )
    return answers


def choices(table):
    questions = [(n, k, m, 8, "group") for n, k in ((4096, 4096), (8192, 2048)) for m in (1, 8, 64, 512, 4096)]
    found = estimates(text_of(table), questions)
    return [
        Choice(*q, [(name, 0.0, us) for name, us in times.items()]) for q, times in zip(questions, found, strict=True)
    ]


def test_finds_the_costs_that_made_the_times():
    start = TRUE | {"launch_us": 6.0, "clocks": 300.0, "read": 1.4}
    found = fit(choices(TRUE), text_of(start, "a comment"), rounds=12, asked=estimates)
    assert found.error < 0.01 < found.error_before and found.regret <= found.regret_before
    for name in ("launch_us", "clocks", "read"):
        assert found.table[name] == pytest.approx(TRUE[name], rel=0.03)
    assert found.table["bandwidth_share"] == 0.9 and found.table["unused"] == 5.0
    with pytest.raises(ValueError, match="needs measurements"):
        fit([], text_of(start))


def test_a_table_goes_through_its_text():
    assert parse(text_of(TRUE, "two\nlines")) == TRUE


def test_the_cpu_has_nothing_to_fit(capsys, tmp_path):
    assert main(["bench", "linear", "--device", "cpu", "--fit", str(tmp_path / "x")]) == 2
    assert "is for a GPU" in capsys.readouterr().err


def test_host_times(capsys):
    assert main(["bench", "host", "--device", "cpu", "--json"]) == 0
    points = {p["operator"]: p["microseconds"] for p in json.loads(capsys.readouterr().out)["points"]}
    assert {"flexq.linear", "flexq.rms_norm_linear", "flexq.silu_mul_linear"} <= points.keys()
    assert len(points) == 10 and all(0 < us < 10_000 for us in points.values())


def test_bench_experts(capsys, monkeypatch):
    from flexq.bench import experts

    monkeypatch.setitem(experts.SHAPES, "tiny", experts.ExpertsShape(4, 2, 128, 128))
    assert main(["bench", "experts", "--device", "cpu", "--shape", "tiny", "--tokens", "1", "7", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "flexq W6A8 group" in printed and "bf16 grouped_mm" in printed and "best / floor" in printed
    assert main(["bench", "experts", "--device", "cpu", "--shape", "gpt-9"]) == 1
    assert "unknown shape 'gpt-9'; known are qwen3-30b-a3b" in capsys.readouterr().err


def test_peers_that_compute_something_else_are_left_out(monkeypatch):
    from flexq.bench import experts

    ours = experts._TransformersExperts.calls

    def calls(self, m):
        good = ours(self, m)
        return good | {"wrong": lambda *a: -good["bf16 grouped_mm"](*a), "not finite": lambda x, *_: x * float("nan")}

    monkeypatch.setattr(experts._TransformersExperts, "calls", calls)
    monkeypatch.setitem(experts.SHAPES, "tiny", experts.ExpertsShape(4, 2, 128, 128))
    with pytest.warns(UserWarning) as warned:
        points = experts.bench_experts("tiny", tokens=[3])
    assert {p.contender for p in points} >= {"bf16 grouped_mm", "bf16 batched_mm", "flexq W6A8 group"}
    assert not {"wrong", "not finite"} & {p.contender for p in points}
    said = " ".join(str(w.message) for w in warned)
    assert "wrong is left out" in said and "off by 2.00 of bf16's" in said and "not finite is left out" in said


def test_explain_names_the_table(capsys):
    arguments = ["bench", "linear", "--device", "cpu", "--explain", "--shape", "64x128", "--tokens", "1", "--quiet"]
    assert main(arguments) == 0
    assert "costs of table none" in capsys.readouterr().out
