"""Arms beside a reference: which one, on what, with which words; and what is never set side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_reporting
from scipy import stats
from test_reporting import ASKED, PLACE, TRAINING, Bench

from kallm_bench.errors import RecordError
from kallm_bench.records import Metric
from kallm_bench.reporting import Row, Table, build_tables, to_markdown

KAN, LINEAR = {"basis": "cheby2", "degree": 2}, {"basis": "linear"}

SHAPE = {"degree": None, "hidden": None, "form": "stack", "constant": "bias", "blocks": [1], "seed": 0}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def differences(bench: Bench, reference: str | None = None) -> Table | None:
    tables = build_tables(bench.store, reference=reference)
    return next((table for table in tables if table.kind == "differences"), None)


def rows(bench: Bench, reference: str | None = None) -> dict[str, Row]:
    table = differences(bench, reference)
    assert table is not None
    return {row.name: row for row in table.rows}


def test_a_kan_is_set_beside_the_linear_control_of_its_size(bench: Bench) -> None:
    bench.arm("untouched", 0, None, 2.0, right=8)
    bench.arm("kan", 0, KAN, 2.0, right=8, replaced=1000)
    assert differences(bench) is None
    bench.arm("linear", 0, LINEAR, 2.0, right=2, replaced=3000)
    assert rows(bench)["kan"].words["against"] == "linear"
    bench.arm("matched", 0, LINEAR | {"hidden": 512}, 2.5, right=1, replaced=1010)
    found = rows(bench)
    assert set(found) == {"kan"}
    assert found["kan"].words["against"] == "matched"
    assert found["kan"].figures["heldout_loss_difference"].value == -0.5
    assert found["kan"].figures["accuracy_difference"].value == pytest.approx(100 * 7 / 8)


def test_a_lead_at_one_learning_rate_is_told_as_that(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> list[str]:
        table = differences(bench)
        assert table is not None
        return [note for note in table.notes if "learning rate" in note]

    bench.arm("kan", 0, KAN, 2.0, right=8, replaced=1000)
    bench.arm("linear", 0, LINEAR, 2.5, right=8, replaced=1000)
    assert told() == ["All at one learning rate, 0.0004: another may turn differences of losses round."]
    monkeypatch.setattr(test_reporting, "TRAINING", TRAINING | {"learning_rate": 1.2e-3})
    bench.arm("kan-fast", 0, KAN, 2.0, right=8, replaced=1000)
    assert told(), "nothing was set beside it yet"
    bench.arm("linear-fast", 0, LINEAR, 2.5, right=8, replaced=1000)
    assert not told()


def test_a_control_must_be_trained_alike(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arm("kan", 0, KAN, 2.0, right=8, replaced=1000)
    monkeypatch.setattr(test_reporting, "TRAINING", TRAINING | {"scope": "all"})
    bench.arm("matched", 0, LINEAR, 2.0, right=8, replaced=1000)
    assert differences(bench) is None
    assert rows(bench, "matched")["kan"].words["against"] == "matched"  # unless one asks for it


def test_a_control_has_the_same_curriculum_where_there_is_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its curriculum that counts which a linear arm can have too: no degree rises there."""

    def add(name: str, spec: dict[str, Any], **curriculum: Any) -> None:
        taught = TRAINING | ({"curriculum": curriculum} if curriculum else {})
        monkeypatch.setattr(test_reporting, "TRAINING", taught)
        bench.arm(name, 0, spec, 2.0, right=8, replaced=1000)

    add("linear", LINEAR)
    add("linear+stages", LINEAR, stages="backwards", anneal=None)
    add("kan+stages", KAN, start_degree=None, stages="backwards", anneal=None)
    add("kan+degree", KAN, start_degree=1, stages=None, anneal=None)
    add("kan+anneal", KAN, start_degree=None, stages=None, anneal="linear")
    assert rows(bench)["kan+stages"].words["against"] == "linear+stages"
    assert rows(bench)["kan+degree"].words["against"] == "linear"
    assert rows(bench)["kan+anneal"].words["against"].startswith("linear")  # none had that one


def test_a_control_was_trained_for_as_long_before(bench: Bench) -> None:
    """Arms that go on from others are set beside those that did so too."""

    def add(name: str, spec: dict[str, Any], loss: float, after: str = "") -> str:
        settings = {"spec": SHAPE | spec, "weights": f"{name}-before"}
        bench.record("retrofit", name, 0, settings, [], parents=(after,) if after else ())
        metrics = [Metric("heldout_loss", loss), Metric("trained_tokens", 8192)]
        trained = TRAINING | PLACE | {"weights": f"{name}-made"}
        bench.record("train", name, 0, trained, metrics, parents=(f"r{bench.count:04d}",))
        return f"r{bench.count:04d}"

    linear, kan = add("linear", LINEAR, 3.0), add("kan", KAN, 2.9)
    add("linear-longer", LINEAR, 2.8, linear)
    add("kan-longer", KAN, 2.6, kan)
    found = rows(bench)
    against = {name: row.words["against"] for name, row in found.items()}
    assert against == {"kan": "linear", "kan-longer": "linear-longer"}
    assert found["kan-longer"].figures["heldout_loss_difference"].value == pytest.approx(-0.2)


def test_a_reference_is_set_beside_all_others(bench: Bench) -> None:
    bench.arm("untouched", 0, None, 2.0, right=4)
    bench.arm("linear", 0, LINEAR, 2.1, right=2)
    bench.arm("kan", 0, KAN, 2.2, right=8)
    found = rows(bench, "untouched")
    assert set(found) == {"linear", "kan"}
    assert found["linear"].figures["accuracy_difference"].value == pytest.approx(-25)
    assert found["kan"].figures["accuracy_difference"].value == pytest.approx(50)
    with pytest.raises(RecordError, match=r"no arm 'untuched'\. Did you mean 'untouched'"):
        build_tables(bench.store, reference="untuched")


def test_words_follow_the_questions(bench: Bench) -> None:
    bench.arm("linear", 0, LINEAR, 2.1, right=0)
    bench.arm("kan", 0, KAN, 2.2, right=8)
    bench.arm("other", 0, KAN | {"degree": 3}, 2.2, right=1)
    found = rows(bench)
    assert found["kan"].words["verdict on accuracy"] == "better"
    assert found["kan"].words["McNemar's p"] == "0.0078"  # 2 / 2^8
    assert found["other"].words["verdict on accuracy"] == "not distinguishable"
    assert found["other"].words["McNemar's p"] == "1"
    assert not any("comparisons:" in note for note in differences(bench).notes)  # type: ignore[union-attr]
    bench.arm("third", 0, KAN | {"degree": 4}, 2.2, right=1)
    note = "3 comparisons: were all of these arms equals, about 0.15 would be called better or worse."
    assert note in differences(bench).notes  # type: ignore[union-attr]
    assert found["kan"].comparison is not None
    table = differences(bench)
    assert table is not None
    assert "| kan | 1 | linear | better | 0.0078 | 0, 0 of 2 | +100.0 [" in to_markdown([table])


def test_seeds_give_a_p_value_a_pair_and_losses_an_interval(bench: Bench) -> None:
    losses = {"linear": (2.5, 2.6, 2.55), "kan": (2.4, 2.52, 2.47)}
    for seed in range(3):
        bench.arm("linear", seed, LINEAR, losses["linear"][seed], right=3 + seed)
        bench.arm("kan", seed, KAN, losses["kan"][seed], right=4)
    row = rows(bench)["kan"]
    assert row.words["McNemar's p"].count(",") == 2
    expected = stats.ttest_rel(losses["kan"], losses["linear"]).confidence_interval()
    assert row.figures["heldout_loss_difference"].interval == pytest.approx((expected.low, expected.high))
    assert row.figures["decode_to_reference"].over == "seeds"
    assert math.isclose(row.figures["decode_to_reference"].value, 1.0)


def test_other_questions_are_never_compared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arm("linear", 0, LINEAR, 2.1, right=0)
    monkeypatch.setattr(test_reporting, "ASKED", ASKED | {"questions": "others"})
    bench.arm("kan", 0, KAN, 2.2, right=8)
    table = differences(bench)
    assert table is not None
    assert "accuracy_difference" not in table.metrics
    assert "verdict on accuracy" not in table.words
    note = "No accuracy difference where the questions, or how they were asked, differ: 'kan' and 'linear'."
    assert note in table.notes


def test_two_ways_of_asking_are_compared_each_with_itself(bench: Bench) -> None:
    for name, spec, right in (("linear", LINEAR, 2), ("kan", KAN, 8)):
        bench.arm(name, 0, spec, 2.0, right=right, replaced=1000)
        other = ASKED | {"protocol": "zeroshot", "weights": bench.trained}
        samples = [{"task": "snarks", "index": n, "correct": True} for n in range(8)]
        bench.record("eval-bbh", name, 0, other, [Metric("accuracy", 1.0, n=8)], samples=samples)
    table = differences(bench)
    assert table is not None
    found = [(row.label, row.words["against"], row.figures["accuracy_difference"].value) for row in table.rows]
    assert found == [
        ("kan (chat, procedural)", "linear (chat, procedural)", 75.0),
        ("kan (zeroshot)", "linear (zeroshot)", 0.0),
    ]


def likely(bench: Bench, name: str, seed: int, spec: dict[str, Any], values: list[list[float]]) -> None:
    """An arm whose right answers have these log-likelihoods, by task; the last task lists no choices."""
    bench.arm(name, seed, spec, 2.0, right=4, replaced=1000)
    tasks = ("navigate", "snarks", "word_sorting")
    samples = [
        {"task": task, "index": n, "correct": n < 2, "completion": "", "loglikelihoods": [value, -2.0]}
        | {"target_loglikelihood": value, "target_rank": 1, "choices": ["a", "b"] if task != "word_sorting" else []}
        for task, each in zip(tasks, values, strict=True)
        for n, value in enumerate(each)
    ]
    settings = ASKED | {"likelihoods": True, "weights": bench.trained}
    metrics = [Metric("accuracy", 0.5, n=8), Metric("target_loglikelihood", float(np.mean(values[:2])), n=8)]
    bench.record("eval-bbh", name, seed, settings, metrics, samples=samples)


def test_right_answers_are_likelier_or_less_likely_on_the_same_questions(bench: Bench) -> None:
    """By the plain mean over tasks with choices; questions differ far more than the arms do."""
    questions = np.random.default_rng(0).normal(-5, 3, size=(3, 20))
    noise = np.random.default_rng(1).normal(0, 0.1, size=(4, 3, 20))
    likely(bench, "linear", 0, LINEAR, (questions + noise[0]).tolist())
    likely(bench, "better", 0, KAN, (questions + 0.2 + noise[1]).tolist())
    likely(bench, "worse", 0, KAN | {"degree": 3}, (questions - 0.2 + noise[2]).tolist())
    likely(bench, "alike", 0, KAN | {"degree": 4}, (questions + noise[3]).tolist())
    found = {name: row.figures["likelihood_difference"] for name, row in rows(bench).items()}
    assert {name: figure.mark for name, figure in found.items()} == {"better": "▲", "worse": "▼", "alike": ""}
    for number, (name, shift) in enumerate((("better", 0.2), ("worse", -0.2), ("alike", 0.0)), start=1):
        apart = (noise[number] - noise[0])[:2]
        low, high = found[name].interval or (0.0, 0.0)
        assert found[name].value == pytest.approx(apart.mean() + shift)
        error = math.sqrt((apart.var(axis=1, ddof=1) / 20).sum()) / 2
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
        assert low < found[name].value < high
        assert found[name].over == "questions"
    table = differences(bench)
    assert table is not None
    assert any("▲ likelier than the reference has them, ▼ less likely" in note for note in table.notes)
    assert "log-likelihood difference, nats" in to_markdown([table])


def test_seeds_of_likelihoods_are_no_new_questions(bench: Bench) -> None:
    """Twice the same answers are known no better; one without likelihoods says nothing of them."""
    values = np.random.default_rng(0).normal(-5, 3, size=(3, 12))
    likely(bench, "linear", 0, LINEAR, values.tolist())
    likely(bench, "kan", 0, KAN, (values * 0.9).tolist())
    before = rows(bench)["kan"].figures["likelihood_difference"]
    for seed in (1, 2):
        likely(bench, "kan", seed, KAN, (values * 0.9).tolist())
    after = rows(bench)["kan"].figures["likelihood_difference"]
    assert after.value == pytest.approx(before.value)
    assert after.interval == pytest.approx(before.interval)
    assert before.mark == "▲"
    bench.arm("plain", 0, KAN | {"degree": 5}, 2.0, right=4, replaced=1000)
    assert "likelihood_difference" not in rows(bench)["plain"].figures


@pytest.mark.parametrize(("shifts", "mark"), [((0.1, 0.5, 0.1), ""), ((0.2, 0.25, 0.25), "▲")])
def test_what_other_seeds_may_turn_round_is_not_marked(bench: Bench, shifts: tuple[float, ...], mark: str) -> None:
    """The interval over questions alone would be sure of either."""
    values = np.random.default_rng(0).normal(-5, 3, size=(3, 12))
    noise = np.random.default_rng(1).normal(0, 0.01, size=(3, 3, 12))
    for seed, shift in enumerate(shifts):
        likely(bench, "linear", seed, LINEAR, values.tolist())
        likely(bench, "kan", seed, KAN, (values + shift + noise[seed]).tolist())
    figure = rows(bench)["kan"].figures["likelihood_difference"]
    assert figure.interval is not None
    assert figure.interval[0] > 0
    assert figure.mark == mark


def test_other_held_out_rows_are_never_compared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arm("linear", 0, LINEAR, 2.1, right=0)
    monkeypatch.setattr(test_reporting, "TRAINING", TRAINING | {"heldout": "other rows"})
    bench.arm("kan", 0, KAN, 2.2, right=8)
    row = rows(bench, "linear")["kan"]
    assert "heldout_loss_difference" not in row.figures
    assert "accuracy_difference" in row.figures


def with_curve(bench: Bench, name: str, seed: int, losses: tuple[float, ...], spec: dict[str, Any]) -> None:
    """An arm whose held-out losses were taken before the first of 8 steps, after every second one, and at the end."""
    settings = test_reporting.TRAINING | {"seed": seed, "weights": "base"}
    metrics = [
        Metric("heldout_loss", losses[-1], n=500),
        Metric("trained_tokens", 8000),
        Metric("train_loss", 2.0, n=1, samples=(3.0,) * 8),
        Metric("heldout_curve", min(losses), n=len(losses), samples=losses, note="samples every 2 steps"),
    ]
    model = {"fingerprint": f"trained {name} {seed}", "specs": [spec]}
    bench.record("train", name, seed, settings, metrics, model=model, data={"source": "chat"})


def test_tokens_to_the_loss_of_another(bench: Bench) -> None:
    linear, kan = ({"blocks": [1], "hidden": 8, "form": "stack", "constant": "bias", **spec} for spec in (LINEAR, KAN))
    for seed in range(2):
        with_curve(bench, "linear", seed, (5.0, 4.0, 3.5, 3.25, 3.0), linear)
    with_curve(bench, "fast", 0, (5.0, 3.5, 2.5, 2.4, 2.3), kan)  # half way between a quarter and a half
    with_curve(bench, "fast", 1, (5.0, 3.0, 2.5, 2.4, 2.3), kan)
    with_curve(bench, "late", 0, (5.0, 4.0, 3.5, 3.25, 2.75), kan)  # half way in the last quarter
    with_curve(bench, "never", 0, (5.0, 4.0, 3.5, 3.25, 2.9), kan)
    with_curve(bench, "never", 1, (5.0, 4.0, 3.5, 3.25, 3.01), kan)
    with_curve(bench, "there", 0, (3.0, 2.9, 2.8, 2.7, 2.6), kan)
    table = differences(bench, "linear")
    assert table is not None
    found = {row.name: row.figures.get("tokens_to_reference") for row in table.rows}
    assert {name: figure and figure.value for name, figure in found.items()} == {
        "fast": pytest.approx(0.3125), "late": pytest.approx(0.875), "never": None, "there": 0.0
    }  # fmt: skip
    assert found["fast"] is not None
    assert found["fast"].interval == pytest.approx((0.0, 1.1066), abs=1e-3)  # 0.375 and 0.25, by Student's t
    assert "Not as low, in some seed, by the end: never." in table.notes


def test_unequal_pairs_are_named(bench: Bench) -> None:
    bench.arm("linear", 0, LINEAR, 2.1, right=8, replaced=1000)
    bench.arm("kan", 0, KAN, 2.2, right=8, replaced=1005)
    bench.arm("warm", 0, KAN | {"start": "lstsq"}, 2.0, right=8, replaced=500)

    def unequal() -> list[str]:
        table = differences(bench)
        assert table is not None
        return [note for note in table.notes if note.startswith("Not of equal")]

    assert unequal() == ["Not of equal size: 'warm' beside 'linear'.", "Not of equal start: 'warm' beside 'linear'."]
    bench.arm("linear-warm", 0, LINEAR | {"start": "lstsq"}, 2.1, right=8, replaced=500)
    assert unequal() == []


def test_answers_that_are_gone_leave_the_rest(bench: Bench) -> None:
    bench.arm("linear", 0, LINEAR, 2.1, right=0)
    bench.arm("kan", 0, KAN, 2.2, right=8)
    for path in bench.store.folder.rglob("*.samples.jsonl.gz"):
        path.write_bytes(b"damaged")
    row = rows(bench)["kan"]
    assert "accuracy_difference" not in row.figures
    assert "heldout_loss_difference" in row.figures
    assert len(bench.store.damaged) == 2


def test_ratios_of_single_runs_keep_what_their_samples_leave_open(bench: Bench) -> None:
    samples = {"linear": (90.0, 100.0, 105.0), "kan": (45.0, 50.0, 51.0)}
    for name, spec in (("linear", LINEAR), ("kan", KAN)):
        bench.arm(name, 0, spec, 2.0, right=4)
        settings: dict[str, Any] = {"batch": 8, "length": 64, **PLACE, "weights": bench.trained}
        speed = Metric("prefill_tokens_per_second", samples[name][1], n=3, samples=samples[name])
        bench.record("profile", name, 0, settings, [speed])
    figure = rows(bench)["kan"].figures["prefill_to_reference"]
    assert figure.value == 0.5
    assert figure.interval == pytest.approx((45 / 105, 51 / 90))
    assert figure.over == "samples"


def test_another_batch_is_another_speed(bench: Bench) -> None:
    for name, spec, batch in (("linear", LINEAR, 8), ("kan", KAN, 4)):
        bench.arm(name, 0, spec, 2.0, right=4)
        settings: dict[str, Any] = {"batch": batch, **PLACE, "weights": bench.trained}
        measured = [Metric("parameters", 10.0), Metric("prefill_tokens_per_second", 5.0)]
        bench.record("profile", name, 0, settings, measured)
    figures = rows(bench)["kan"].figures
    assert "prefill_to_reference" not in figures
    assert figures["parameters_to_reference"].value == 1.0
