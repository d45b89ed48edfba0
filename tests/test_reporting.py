"""Reports: what is averaged, what is not, what is said below, and how it looks."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from kallm_bench.records import Ending, Metric, ResultsStore, RunRecord
from kallm_bench.reporting import Table, build_tables, to_csv, to_markdown

MACHINE = {"cpu": "a processor", "cores": 2, "memory_gib": 24, "gpus": [], "system": "Linux"}
PLACE = {"device": "cpu", "dtype": "float32"}
TRAINING = {"row_length": 256, "rows_per_step": 2, "learning_rate": 4e-4, "scope": "tail", **PLACE}
ASKED = {"protocol": "chat", "tasks": ["navigate", "snarks"], "max_new_tokens": 64, "questions": "q", **PLACE}


class Bench:
    """Writes records as stages would, with the figures a test asks for."""

    def __init__(self, folder: Path, prefix: str = "r") -> None:
        self.prefix = prefix
        self.store = ResultsStore(folder)
        self.testbed = self.store.testbed(MACHINE)
        self.count = 0
        self.base = "base"

    def _id(self) -> str:
        """Of the newest record."""
        return f"{self.prefix}{self.count:04d}"

    def record(
        self, stage: str, arm: str, seed: int, settings: dict[str, Any], metrics: list[Metric], **rest: Any
    ) -> None:
        self.count += 1
        rest = {"key": f"k{self.count}"} | rest
        samples = rest.pop("samples", None)
        self.store.write(
            RunRecord(
                id=self._id(),
                stage=stage,
                suite="try",
                arm=arm,
                seed=seed,
                testbed=self.testbed,
                started=f"2026-01-01T00:{self.count // 60:02d}:{self.count % 60:02d}+00:00",
                seconds=1.0,
                parents=rest.pop("parents", ()),
                settings=settings,
                model=rest.pop("model", {}),
                data=rest.pop("data", {}),
                metrics=tuple(metrics),
                environment={"git": {"commit": "abcdef1234567", "dirty": False}},
                **rest,
            ),
            samples,
        )

    def ending(self, arm: str, seed: int, stage: str, reason: str) -> Ending:
        """How a cell ended, after all that was written before; no reason says that it went well."""
        self.count += 1
        ended = f"2026-01-01T00:{self.count // 60:02d}:{self.count % 60:02d}.500000+00:00"
        ending = Ending(self._id(), "try", arm, seed, self.testbed, stage, ended, reason, "try.toml")
        self.store.write_ending(ending)
        return ending

    def arm(
        self,
        name: str,
        seed: int,
        spec: dict[str, Any] | None,
        loss: float,
        right: int,
        replaced: int = 0,
        profiled_batch: int | None = 4,
    ) -> None:
        """All four stages, or without the profile; `right` of eight questions are answered right."""
        base, made, trained = self.base, f"made{self.count}", f"trained{self.count}"
        if spec:
            spec = {"hidden": None, "degree": None, "form": "stack", "constant": "bias", "blocks": [25, 26, 29]} | spec
            metrics = [Metric("replaced_parameters", replaced)]
            settings = {"spec": spec | {"seed": seed}, "weights": base}
            self.record("retrofit", name, seed, settings, metrics, model={"fingerprint": made})
        parents = (self._id(),) if spec else ()
        losses = [
            Metric("heldout_loss", loss, n=500),
            Metric("trained_tokens", 8192 if spec else 0),
            Metric("trainable_parameters", 100),
            *([Metric("train_loss", loss, n=2, samples=tuple(loss + 2 / n for n in range(1, 17)))] if spec else []),
        ]
        about: dict[str, Any] = {"model": {"fingerprint": trained}, "data": {"source": "chat"}, "parents": parents}
        self.record("train", name, seed, TRAINING | {"seed": seed, "weights": made}, losses, **about)
        samples = [{"task": ASKED["tasks"][n % 2], "index": n // 2, "correct": n < right} for n in range(8)]
        accuracy = [
            Metric("accuracy", right / 8, n=8),
            Metric("guessing_accuracy", 0.5, n=8),
            Metric("majority_accuracy", 0.55, n=8),
            *(Metric(f"accuracy/{task}", right / 8, n=4) for task in ASKED["tasks"]),
            *(Metric(f"guessing_accuracy/{task}", 0.5, n=4) for task in ASKED["tasks"]),
        ]
        about = {"data": {"source": "procedural", "fingerprint": "q"}, "parents": (self._id(),)}
        self.record("eval-bbh", name, seed, ASKED | {"weights": trained}, accuracy, samples=samples, **about)
        self.trained = trained
        if profiled_batch is None:
            return
        note = "spread 8%; the CPU was busy"
        measured = [Metric("parameters", 134_515_008), Metric("decode_tokens_per_second", 75.4, n=3, note=note)]
        self.record("profile", name, seed, {"batch": profiled_batch, **PLACE, "weights": trained}, measured)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def only_table(bench: Bench) -> Table:
    (table,) = [table for table in build_tables(bench.store) if table.kind == "arms"]
    return table


def test_parameters_are_those_of_the_trained_model_where_nothing_else_tells(bench: Bench) -> None:
    """As of an arm that replaced nothing and was not profiled."""
    metrics, model = [Metric("heldout_loss", 2.0), Metric("trained_tokens", 8192)], {"parameters": 134_515_008}
    bench.record("train", "finetune", 0, TRAINING | {"seed": 0, "weights": "base"}, metrics, model=model)
    (row,) = only_table(bench).rows
    assert row.figures["parameters"].value == 134_515_008


def test_arms_stand_in_their_suites_order(bench: Bench) -> None:
    """Whatever order they ran in; those that its file does not name come last, and names without records nowhere."""
    for name in ("gone", "kan", "linear"):
        bench.arm(name, 0, {"basis": "linear"}, 2.0, right=8)
    tables = build_tables(bench.store, order=lambda named: ["untouched", "linear", "kan"])
    (arms,) = [table for table in tables if table.kind == "arms"]
    assert [row.name for row in arms.rows if row.seeds] == ["linear", "kan", "gone"]


def test_training_steps_are_compared_way_by_way(bench: Bench) -> None:
    settings = {"batch": 32, "length": 1024, "repeats": 5, "scope": "tail", **PLACE}
    speeds = [("", 800.0), ("/plain", 200.0), ("/kept", 1800.0)]
    metrics = [Metric(f"train_tokens_per_second{way}", speed, n=5) for way, speed in speeds]
    bench.record("profile", "kan", 0, settings, [*metrics, Metric("train_mfu", None, note="unknown")])
    bench.record("profile", "other", 0, settings, metrics[:1])  # one way alone is nothing to compare
    table = next(table for table in build_tables(bench.store) if table.kind == "training")
    assert [row.name for row in table.rows] == ["kan"] * 3
    assert [row.figures["train_to_plain"].value for row in table.rows] == [1.0, 4.0, 9.0]
    assert table.metrics == ("train_tokens_per_second", "train_to_plain")
    text = to_markdown([table])
    assert "| kan | kallm train |  | 800 | 4.00 |" in text
    assert "32 rows of 1,024 tokens" in text


def test_seeds_are_averaged_with_an_interval(bench: Bench) -> None:
    for seed, loss in enumerate((2.389, 2.391, 2.398)):
        bench.arm("kan", seed, {"basis": "cheby2", "degree": 2, "hidden": 384}, loss, right=8, replaced=100)
    row = only_table(bench).rows[0]
    assert row.seeds == 3
    assert row.figures["heldout_loss"].value == pytest.approx(2.392667, abs=1e-6)
    low, high = row.figures["heldout_loss"].interval or (0, 0)
    assert (low, high) == pytest.approx((2.38093, 2.40440), abs=1e-4)  # mean ± 4.303 · s/√3
    assert row.what == "cheby2 degree 2, stack, hidden 384, blocks 25-26,29"


def test_a_seed_without_a_profile_belongs_to_those_with_one(bench: Bench, tmp_path: Path) -> None:
    for seed, batch in enumerate((None, 4, None, 8)):
        bench.arm("kan", seed, {"basis": "cheby2"}, 2.0 + seed, right=8, replaced=100, profiled_batch=batch)
    rows = [row for row in only_table(bench).rows if row.name == "kan"]
    assert [row.seeds for row in rows] == [3, 1]  # another way of profiling is another row
    assert [row.figures["heldout_loss"].value for row in rows] == [3.0, 5.0]
    assert [row.figures["decode_tokens_per_second"].value for row in rows] == [75.4, 75.4]
    unprofiled = Bench(tmp_path / "other")
    for seed in range(2):
        unprofiled.arm("kan", seed, {"basis": "cheby2"}, 2.0, right=8, replaced=100, profiled_batch=None)
    assert [row.seeds for row in only_table(unprofiled).rows if row.name == "kan"] == [2]


def test_what_was_asked_again_stands_for_the_first_time(bench: Bench) -> None:
    """Also where the first record was made before settings of later versions were noted."""
    bench.arm("kan", 0, {"basis": "cheby2"}, 2.0, right=8, replaced=100)
    later = {"reading": "chat", "batch_invariant": False, "prompts": "p", "weights": bench.trained}
    about = {"data": {"source": "procedural", "fingerprint": "q"}}
    bench.record("eval-bbh", "kan", 0, ASKED | later, [Metric("accuracy", 0.5, n=8)], **about)
    assert [row.figures["accuracy"].value for row in only_table(bench).rows if row.name == "kan"] == [0.5]
    bench.record("eval-bbh", "kan", 0, ASKED | later | {"prompts": "others"}, [Metric("accuracy", 0.25, n=8)], **about)
    rows = [row for row in only_table(bench).rows if row.name == "kan"]
    assert [(row.label, row.figures["accuracy"].value) for row in rows] == [("kan (1)", 0.5), ("kan (2)", 0.25)]


def test_arms_that_were_taught_otherwise_say_so_and_need_a_control_of_their_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kan, linear = {"basis": "cheby2", "degree": 4}, {"basis": "linear", "hidden": 512}
    plain = dict(TRAINING)

    def add(name: str, seed: int, spec: dict[str, Any] | None, **lessons: Any) -> None:
        monkeypatch.setitem(globals(), "TRAINING", plain | lessons)
        bench.arm(name, seed, spec, 2.0 + seed, right=8, replaced=100)

    curriculum = {"start_degree": 1, "stages": "backwards", "anneal": None}
    distillation = {"weight": 0.5, "temperature": 2.0}
    add("untouched", 0, None)
    add("linear", 0, linear)
    add("kan", 0, kan, curriculum=curriculum)
    add("kan", 1, kan, curriculum=curriculum | {"stages": None})
    add("kan+distilled", 0, kan, distillation=distillation)
    table = only_table(bench)
    rows = [(row.name, row.what.partition("; ")[2], row.seeds) for row in table.rows if row.name.startswith("kan")]
    assert rows == [
        ("kan", "degree rising from 1; replaced block by block, backwards", 1),
        ("kan", "degree rising from 1", 1),
        ("kan+distilled", "distilled, weight 0.5 at temperature 2", 1),
    ]
    missing = [note for note in table.notes if note.startswith("Not in this suite")]
    assert missing == [
        "Not in this suite: a linear control with as many parameters as 'kan+distilled', distilled like it."
    ]
    assert "Rows differ in train settings: curriculum, distillation." in table.notes
    add("linear+distilled", 0, linear, distillation=distillation)
    assert not [note for note in only_table(bench).notes if note.startswith("Not in this suite")]


def test_low_rank_adapters_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lora(rank: int, *targets: str) -> None:
        monkeypatch.setitem(TRAINING, "scope", "lora")
        monkeypatch.setitem(TRAINING, "lora_rank", rank)
        monkeypatch.setitem(TRAINING, "lora_targets", list(targets))

    def train(arm: str) -> None:
        metrics = [Metric("heldout_loss", 2.0, n=500), Metric("trained_tokens", 8192)]
        bench.record("train", arm, 0, TRAINING | {"weights": "base"}, metrics, model={"fingerprint": arm})

    train("finetune")
    lora(16)
    train("lora")
    bench.arm("kan+lora", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    lora(64, "q_proj", "v_proj")
    train("lora-attention")
    bench.arm("kan+lora-attention", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    assert {row.name: row.what for row in only_table(bench).rows if row.what != "no model"} == {
        "finetune": "fine-tuned, nothing replaced",
        "lora": "LoRA of rank 16, nothing replaced",
        "lora-attention": "LoRA of rank 64 on q_proj and v_proj, nothing replaced",
        "kan+lora": "cheby2 degree 2, stack, blocks 25-26,29, LoRA of rank 16",
        "kan+lora-attention": "cheby2 degree 2, stack, blocks 25-26,29, LoRA of rank 64 on q_proj and v_proj",
    }


def test_rows_of_different_settings_are_never_averaged(bench: Bench) -> None:
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    bench.arm("kan", 1, {"basis": "cheby2", "degree": 3}, 3.0, right=8)
    rows = [row for row in only_table(bench).rows if row.name == "kan"]
    assert sorted(row.figures["heldout_loss"].value for row in rows) == [2.0, 3.0]
    assert [row.seeds for row in rows] == [1, 1]


def test_another_way_of_asking_is_another_row(bench: Bench) -> None:
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    other = ASKED | {"questions": "others", "weights": bench.trained}
    about = {"source": "BIG-Bench Hard", "fingerprint": "others"}
    bench.record("eval-bbh", "kan", 0, other, [Metric("accuracy", 0.25, n=9)], data=about)
    table = only_table(bench)
    assert sorted(row.figures["accuracy"].value for row in table.rows if row.name == "kan") == [0.25, 1.0]
    assert any("Rows differ in eval-bbh settings: questions" in note for note in table.notes)
    assert any("A subset: navigate, snarks" in note for note in table.notes)


def test_a_newer_record_takes_the_place_of_an_older_one(bench: Bench) -> None:
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 9.0, right=0)
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    (row,) = [row for row in only_table(bench).rows if row.name == "kan"]
    assert row.figures["heldout_loss"].value == 2.0
    assert row.figures["accuracy"].value == 1.0


def test_a_row_is_never_of_two_models(bench: Bench) -> None:
    """Trained again and stopped before the questions: the old answers are not the new model's."""
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 9.0, right=8)
    settings = TRAINING | {"seed": 0, "weights": "made0", "learning_rate": 1.0}
    losses = [Metric("heldout_loss", 2.0, n=500), Metric("trained_tokens", 8192)]
    bench.record("train", "kan", 0, settings, losses, model={"fingerprint": "new"}, parents=("r0001",))
    (row,) = [row for row in only_table(bench).rows if row.name == "kan"]
    assert row.figures["heldout_loss"].value == 2.0
    assert "accuracy" not in row.figures
    assert "decode_tokens_per_second" not in row.figures
    assert row.what.startswith("cheby2 degree 2")


def test_an_arm_is_what_its_parents_made_it(bench: Bench) -> None:
    """An arm whose retrofit was done under another arm's name is still told by it."""
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    settings = TRAINING | {"seed": 0, "weights": "made0", "scope": "tail+head"}
    losses = [Metric("heldout_loss", 1.9, n=500), Metric("trained_tokens", 8192)]
    bench.record("train", "kan-head", 0, settings, losses, model={"fingerprint": "new"}, parents=("r0001",))
    whats = {row.name: row.what for row in only_table(bench).rows}
    assert whats["kan-head"] == whats["kan"] == "cheby2 degree 2, stack, blocks 25-26,29"


def test_a_score_that_guessing_may_reach_is_marked(bench: Bench) -> None:
    bench.arm("lucky", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=5)
    bench.arm("good", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    marks = {row.name: row.figures["accuracy"].mark for row in only_table(bench).rows}
    assert marks["lucky"] == "†"
    assert marks["good"] == ""
    assert any(note.startswith("† The interval includes guessing") for note in only_table(bench).notes)


def test_missing_controls_are_named(bench: Bench) -> None:
    def missing() -> str:
        return next((note for note in only_table(bench).notes if note.startswith("Not in this suite")), "")

    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8, replaced=1000)
    assert missing() == (
        "Not in this suite: the untouched model; a linear restart; a linear control with as many parameters as 'kan'."
    )
    bench.arm("untouched", 0, None, 2.0, right=8)
    bench.arm("linear", 0, {"basis": "linear"}, 2.0, right=8, replaced=3000)
    assert missing() == "Not in this suite: a linear control with as many parameters as 'kan'."
    bench.arm("matched", 0, {"basis": "linear", "hidden": 512}, 2.0, right=8, replaced=1010)
    assert missing() == ""
    bench.arm("kan-warm", 0, {"basis": "cheby2", "degree": 2, "start": "lstsq"}, 2.0, right=8, replaced=1000)
    wanted = "Not in this suite: a linear control with as many parameters as 'kan-warm', started like it."
    assert missing() == wanted
    bench.arm("matched-warm", 0, {"basis": "linear", "start": "lstsq"}, 2.0, right=8, replaced=1010)
    assert missing() == ""


def test_the_markdown_looks_like_this(bench: Bench) -> None:
    """A golden layout: change it knowingly."""
    bench.arm("untouched", 0, None, 2.274, right=8)
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2, "hidden": 384}, 2.391, right=4, replaced=1000)
    golden = (Path(__file__).parent / "golden" / "report.md").read_text()
    assert to_markdown(build_tables(bench.store)) == golden.replace("TESTBED", bench.testbed)


def test_the_csv_holds_plain_numbers_with_units(bench: Bench) -> None:
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.391, right=5)
    (kan, guessing, majority) = csv.DictReader(io.StringIO(to_csv(build_tables(bench.store))))
    assert kan["heldout_loss (nats/token)"] == "2.391"
    assert kan["accuracy (fraction)"] == "0.625"
    assert 0 < float(kan["accuracy (fraction) low"]) < 0.625 < float(kan["accuracy (fraction) high"]) <= 1
    assert kan["peak_resident_bytes (bytes)"] == ""
    assert (guessing["accuracy (fraction)"], majority["accuracy (fraction)"]) == ("0.5", "0.55")


def test_reports_of_two_machines_stand_apart_and_can_be_chosen(bench: Bench) -> None:
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    first = bench.testbed
    bench.testbed = bench.store.testbed(MACHINE | {"cores": 64})
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 3.0, right=8)
    assert [table.testbed for table in build_tables(bench.store)] == sorted([first, bench.testbed])
    (table,) = build_tables(bench.store, testbed=first)
    assert table.rows[0].figures["heldout_loss"].value == 2.0
    assert build_tables(bench.store, suite="other") == []


def test_seeds_that_began_from_other_weights_are_never_averaged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    monkeypatch.setattr(bench, "base", "another model")
    bench.arm("kan", 1, {"basis": "cheby2", "degree": 2}, 3.0, right=8)
    table = only_table(bench)
    rows = [row for row in table.rows if row.name == "kan"]
    assert [(row.label, row.figures["heldout_loss"].value) for row in rows] == [("kan (1)", 2.0), ("kan (2)", 3.0)]
    assert "Not averaged, for they differ: kan (1): weights base; kan (2): weights another model." in table.notes


def test_rows_that_were_not_averaged_say_in_what_they_differ(bench: Bench) -> None:
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    bench.arm("kan", 1, {"basis": "cheby2", "degree": 3}, 3.0, right=8)
    note = next(note for note in only_table(bench).notes if note.startswith("Not averaged"))
    assert note == "Not averaged, for they differ: kan (1): retrofit spec degree 2; kan (2): retrofit spec degree 3."


def test_a_single_run_shows_the_range_of_its_samples(bench: Bench) -> None:
    speed = Metric("prefill_tokens_per_second", 1000.0, n=3, samples=(900.0, 1000.0, 1060.0))
    bench.record("profile", "kan", 0, {"batch": 4, **PLACE}, [speed])
    table = only_table(bench)
    figure = table.rows[0].figures["prefill_tokens_per_second"]
    assert (figure.interval, figure.over) == ((900.0, 1060.0), "samples")
    assert "| 1,000 ± 8 % |" in to_markdown([table])
    assert any(note.startswith("±: half the 95 % interval of the median of one run's samples") for note in table.notes)


def test_a_model_that_was_cut_for_all_arms_is_no_row(bench: Bench) -> None:
    bench.record("cut", "bundled-cut", 0, {"blocks": 3, "weights": "whole"}, [], model={"fingerprint": "base"})
    bench.arm("kan", 0, {"basis": "cheby2"}, 3.5, 5)
    assert [row.name for row in only_table(bench).rows if row.seeds] == ["kan"]
