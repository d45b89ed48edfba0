"""Classification: a model cut to size computes what it did, texts keep whole in their rows, and classes are learned."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import Run
from scipy import stats

from kallm_bench.engine.data import rows_of
from kallm_bench.errors import CheckpointError, DataError, ModelError, SpecError, TrainingError
from kallm_bench.models import KANSpec, cut, cut_config, load_checkpoint, retrofit, save_checkpoint
from kallm_bench.sharing import Shared
from kallm_bench.suites import read_suite
from kallm_bench.training import TrainSettings, answer, find_texts, prepare_texts, put_head, train, used_tokens
from kallm_bench.training.classify import Answers, read_head, write_head
from kallm_bench.training.rows import FIRST, IGNORE

SUBJECTS = {"sport": "goal match team score", "money": "bank shares profit market", "stars": "planet orbit comet moon"}


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Four words on one of three subjects."""
    draw = random.Random(seed)
    chosen = [draw.choice(sorted(SUBJECTS)) for _ in range(count)]
    return [{"text": " ".join(draw.choices(SUBJECTS[label].split(), k=4)), "label": label} for label in chosen]


def write(path: Path, rows: list[Any]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path / "train.jsonl.gz", texts(300)), write(tmp_path / "test.jsonl", texts(60, 1))


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@torch.no_grad()
def test_a_cut_model_computes_what_its_first_blocks_did(
    tiny_llama: Any, bundled_tokenizer: Any, data: tuple[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = tiny_llama(**changes)
    used = used_tokens(find_texts(data[0]), bundled_tokenizer)
    small, tokenizer = cut(model, bundled_tokenizer, 2, used)
    save_checkpoint(tmp_path / "small", small, tokenizer)
    small, tokenizer = load_checkpoint(tmp_path / "small")
    assert len(used) < len(tokenizer) == small.config.vocab_size < 1000
    for row in texts(20):
        old, new = (each(row["text"], return_tensors="pt")["input_ids"] for each in (bundled_tokenizer, tokenizer))
        assert tokenizer.convert_ids_to_tokens(new[0]) == bundled_tokenizer.convert_ids_to_tokens(old[0])
        entering = model.get_decoder()(old, output_hidden_states=True).hidden_states[2]
        logits = model.lm_head(model.model.norm(entering))
        kept = bundled_tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        torch.testing.assert_close(small(new).logits, logits[..., kept])


def test_a_cut_tokenizer_writes_any_text_and_every_special_token(bundled_tokenizer: Any, tiny_llama: Any) -> None:
    small, tokenizer = cut(tiny_llama(), bundled_tokenizer, None, {500, 600})
    for text in ("Xylophone, naïve: 日本 🙂\n\t", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id] == [small.config.eos_token_id]
    assert tokenizer.chat_template == bundled_tokenizer.chat_template
    assert max(tokenizer("Any text at all")["input_ids"]) < small.config.vocab_size == len(tokenizer)


def test_what_cannot_be_cut_is_refused(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    with pytest.raises(SpecError, match="5 blocks cannot stay: the model has 4"):
        cut_config(model.config, 5)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        cut(model, object(), 2, {3})
    retrofit(model, KANSpec("3", "cheby2"))
    with pytest.raises(SpecError, match="before its blocks are replaced"):
        cut(model, None, 2, None)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_every_text_lies_whole_in_a_row_and_bears_its_class_at_its_end(
    bundled_tokenizer: Any, data: tuple[str, str]
) -> None:
    rows, kept = prepare_texts(data[0], bundled_tokenizer, 24, data[1])
    assert rows.names == ("money", "sport", "stars")
    found = []
    for row in range(len(rows)):
        starts = [*np.flatnonzero(rows.flags[row] & FIRST), rows.tokens.shape[1]]
        batch = rows.batch([row])
        for start, end in itertools.pairwise(starts):
            classes = rows.classes[row, start:end]
            assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
            if (classes != IGNORE).any():
                assert (classes != IGNORE).tolist() == [False] * (end - start - 1) + [True]
                text = bundled_tokenizer.decode(rows.tokens[row, start:end])
                found.append({"text": text.removesuffix("<|im_end|>"), "label": rows.names[classes[-1]]})
    assert found == texts(300)
    assert sum(rows.bearing([row]) for row in range(len(rows))) == 300
    assert int((kept.classes != IGNORE).sum()) == 60


def test_rows_are_gone_through_as_often_as_it_takes(bundled_tokenizer: Any, data: tuple[str, str]) -> None:
    rows, _ = prepare_texts(data[0], bundled_tokenizer, 24, data[1])
    twice = rows.enough_for(len(rows) + 1)
    assert len(twice) == 2 * len(rows)
    assert twice.fingerprint != rows.fingerprint
    assert torch.equal(twice.batch([len(rows) + 3])["targets"], rows.batch([3])["targets"])


def test_a_tenth_is_held_out_where_no_other_file_is(bundled_tokenizer: Any, data: tuple[str, str]) -> None:
    rows, kept = prepare_texts(data[0], bundled_tokenizer, 24)
    assert [int((each.classes != IGNORE).sum()) for each in (rows, kept)] == [270, 30]


def test_each_class_has_its_share_of_what_is_held_out_in_any_order(bundled_tokenizer: Any, tmp_path: Path) -> None:
    """Labels that take turns, as of a sorted file that was dealt out; a class of one text is learned."""
    lines = [{"text": f"text {number}", "label": number % 5} for number in range(100)] + [{"text": "alone", "label": 9}]
    rows, kept = prepare_texts(write(tmp_path / "turns.jsonl", lines), bundled_tokenizer, 24)
    counts = [np.bincount(each.classes[each.classes != IGNORE], minlength=6).tolist() for each in (rows, kept)]
    assert counts == [[18, 18, 18, 18, 18, 1], [2, 2, 2, 2, 2, 0]]


def test_parquet_holds_the_same_texts(bundled_tokenizer: Any, data: tuple[str, str], tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts(300)), tmp_path / "train.parquet")
    first, second = (
        prepare_texts(source, bundled_tokenizer, 24, data[1])[0]
        for source in (data[0], str(tmp_path / "train.parquet"))
    )
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.classes, second.classes)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, r'line 2: needs \{"text": "...", "label": ...\}.*it has \'text\''),
        ({"text": 3, "label": 1}, "text is '3' and label '1'"),
        ({"text": "x", "label": 0.5}, "label '0.5'"),
        ({"text": "x", "label": True}, "label 'True'"),
        ({"text": " ", "label": 1}, "line 2: the text is empty"),
        ([1], "it is a list"),
    ],
)
def test_a_broken_text_is_named(bundled_tokenizer: Any, tmp_path: Path, row: Any, says: str) -> None:
    source = write(tmp_path / "bad.jsonl", [{"text": "fine", "label": 0}, row])
    with pytest.raises(DataError, match=says):
        prepare_texts(source, bundled_tokenizer, 24)


def test_training_texts_are_no_heldout_texts_under_another_name(
    bundled_tokenizer: Any, data: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "same.jsonl").write_bytes(gzip.decompress(Path(data[0]).read_bytes()))
    settings = TrainSettings(data[0], str(tmp_path / "same.jsonl"), row_length=24, task="classify")
    with pytest.raises(DataError, match=r"same\.jsonl: the held-out data is the training data"):
        rows_of(settings, bundled_tokenizer, lambda done, total: None, Shared())
    rows_of(dataclasses.replace(settings, heldout=data[1]), bundled_tokenizer, lambda done, total: None, Shared())


def test_classes_that_cannot_be_learned_are_refused(
    bundled_tokenizer: Any, data: tuple[str, str], tmp_path: Path
) -> None:
    other = write(tmp_path / "other.jsonl", [{"text": "x", "label": "art"}])
    with pytest.raises(DataError, match="line 1: no training text is of class 'art'"):
        prepare_texts(data[0], bundled_tokenizer, 24, other)
    with pytest.raises(DataError, match="of 1 classes; at least two"):
        prepare_texts(other, bundled_tokenizer, 24, data[1])
    with pytest.raises(DataError, match="the bundled data are conversations"):
        find_texts("bundled")
    with pytest.raises(TrainingError, match="Did you mean 'classify'"):
        TrainSettings(task="clasify")


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["tail", "all", "lora"])
def test_classes_are_learned_in_every_scope_and_the_models_own_head_comes_back(
    tiny_llama: Any, bundled_tokenizer: Any, data: tuple[str, str], tmp_path: Path, scope: str
) -> None:
    model, tokenizer = cut(tiny_llama(), bundled_tokenizer, 2, used_tokens(find_texts(data[0]), bundled_tokenizer))
    retrofit(model, KANSpec("all", "cheby2", hidden=16))
    rows, kept = prepare_texts(data[0], tokenizer, 24, data[1])
    settings = TrainSettings(
        tokens=40 * 4 * 24, row_length=24, rows_per_step=4, learning_rate=1e-2, scope=scope, task="classify"
    )
    own = put_head(model, rows.names, 0)
    before = answer(model, kept, 100).metrics()[0].value
    result = train(model, rows.enough_for(settings.steps * 4), kept, settings, tmp_path / "state")
    answers = answer(model, kept, 100, batch_rows=3)
    assert own.weight is model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    assert head.weight.requires_grad
    assert result.trainable_parameters >= sum(parameter.numel() for parameter in head.parameters())
    accuracy = answers.metrics()[0].value
    assert accuracy is not None
    assert before is not None
    assert accuracy > max(0.8, before)
    assert [each["target"] for each in answers.samples()] == [row["label"] for row in texts(60, 1)]
    write_head(tmp_path, head, rows.names)
    weight = head.weight.detach().clone()
    put_head(model, rows.names, 7, tmp_path)
    assert torch.equal(model.get_output_embeddings().weight, weight)
    assert np.array_equal(answer(model, kept, 100).given, answers.given)


def test_answers_tell_accuracy_by_class_beside_guessing() -> None:
    answers = Answers(("a", "b"), np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0]))
    metrics = {metric.name: metric for metric in answers.metrics()}
    assert metrics["class_accuracy"].value == 0.6
    assert metrics["guessing_accuracy"].value == 0.5
    assert metrics["majority_accuracy"].value == 0.6
    assert (metrics["class_accuracy/a"].value, metrics["class_accuracy/a"].n) == (0.5, 2)
    assert (metrics["class_accuracy/b"].value, metrics["class_accuracy/b"].n) == (pytest.approx(2 / 3), 3)
    z, p, n = stats.norm.ppf(0.975), 0.6, 5
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert metrics["class_accuracy"].note == f"95 % interval {low:.1%} to {high:.1%}"


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    assert read_head(tmp_path) is None
    (tmp_path / "classifier.json").write_text('{"names": ["a"], "weight": [], "bias": [0.0]}')
    with pytest.raises(CheckpointError, match="damaged"):
        read_head(tmp_path)


def test_the_commands_go_together(
    kallm: Run, tiny_llama: Any, bundled_tokenizer: Any, data: tuple[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A suite cuts, replaces, trains and reports; what it leaves is measured again as it is."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "base", tiny_llama(), bundled_tokenizer)
    (tmp_path / "try.toml").write_text(
        f'model = "./base"\nstages = ["retrofit", "train"]\n[cut]\nblocks = 2\ndata = "{data[0]}"\n'
        f'[train]\ntask = "classify"\ndata = "{data[0]}"\nheldout = "{data[1]}"\ntokens = 960\nrow_length = 24\n'
        'rows_per_step = 4\nlearning_rate = 1e-2\n[[arm]]\nname = "kan"\nbasis = "cheby2"\nblocks = "all"\n'
        '[[arm]]\nname = "linear-matched"\nbasis = "linear"\nblocks = "all"\nparams = "kan"\n'
    )
    assert [cell.cut.blocks for cell in read_suite(tmp_path / "try.toml").cells] == [2, 2]
    code, out, err = kallm("run", "try.toml")
    assert code == 0, err
    report = (tmp_path / "results").glob("*/try/report.md")
    table = next(report).read_text()
    assert "accuracy of classes" in table
    assert "guessing" in table
    assert "60 held-out texts" in table
    cuts = [path for path in (tmp_path / "runs").iterdir() if "-cut-" in path.name and "trained" not in path.name]
    assert len([path for path in cuts if not (path / "classifier.json").exists() and path.name.count("-") == 2]) == 1
    (trained,) = [path for path in (tmp_path / "runs").iterdir() if "cheby2" in path.name and "trained" in path.name]
    words = ("train", str(trained), "--task", "classify", "--data", data[0], "--heldout", data[1], "--row-length", "24")
    code, out, err = kallm(*words, "--tokens", "0", "--json")
    assert code == 0, err
    (again,) = json.loads(out)
    first = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/try/*-train-kan-*.json")]
    value = {metric["name"]: metric["value"] for metric in again["metrics"]}["class_accuracy"]
    assert value == {metric["name"]: metric["value"] for metric in first[0]["metrics"]}["class_accuracy"]
    code, _, err = kallm("train", "base", *words[2:], "--tokens", "0")
    assert code == 1
    assert "no head for classes" in err
