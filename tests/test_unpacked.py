"""Rows without packing: a document alone in its rows, so that architectures which mix documents can be trained too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from test_training import CHAT, SMALL, write_chat
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from kallm_bench.errors import TrainingError
from kallm_bench.training import Forward, TrainSettings, apply_scope, prepare, train
from kallm_bench.training.data import IGNORE
from kallm_bench.training.forward import make_batch
from kallm_bench.training.rows import Apart


def opt() -> PreTrainedModel:
    """An architecture that counts positions in its own way, and so lets packed documents meet."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    made: PreTrainedModel = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=49152, word_embed_proj_dim=32, **sizes)
    )
    return made.eval()


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_chat(tmp_path / "chat.jsonl", CHAT * 60)


def test_each_document_fills_rows_of_its_own() -> None:
    stream = np.arange(1, 101, dtype=np.uint16)
    begins, ends = np.array([3, 20, 50]), np.array([10, 35, 57])
    rows = Apart(stream, begins, ends, 7)
    expected = np.zeros((5, 7), np.uint16)
    expected[0], expected[1], expected[2] = stream[3:10], stream[20:27], stream[27:34]
    expected[3, 0], expected[4] = stream[34], stream[50:57]
    assert rows.shape == (5, 7)
    assert rows[:].dtype == stream.dtype
    assert np.array_equal(rows[:], expected)
    assert np.array_equal(rows[[4, 0, 4]], expected[[4, 0, 4]])
    assert np.array_equal(rows[3], expected[3])
    with pytest.raises(IndexError):
        rows[5]


def test_the_same_words_bear_loss_packed_or_not(bundled_tokenizer: Any, source: str, tmp_path: Path) -> None:
    """In rows as long as any document; all of what is held out is in both, apart from what fills no last row."""
    found = []
    for packing in (True, False):
        _, rows = prepare(source, bundled_tokenizer, 64, tmp_path / "cache", packing=packing)
        targets = rows.batch(range(len(rows)))["targets"]
        found.append(targets[targets != IGNORE].tolist())
    packed, apart = found
    assert 0 < len(apart) - len(packed) < 64
    assert apart[: len(packed) // 2] == packed[: len(packed) // 2]


def test_a_row_has_the_loss_of_its_document_alone(bundled_tokenizer: Any, source: str, tmp_path: Path) -> None:
    rows, _ = prepare(source, bundled_tokenizer, 64, tmp_path / "cache", packing=False)
    model = opt()
    apply_scope(model, "all")
    with Forward(model) as forward:
        for number in range(4):
            loss, count = forward.loss_sum(make_batch(rows, [number]))
            row = rows.batch([number])
            end = int(rows.tokens[number].nonzero()[0][-1]) + 1
            logits = model(input_ids=row["input_ids"][:, :end]).logits[0]
            alone = F.cross_entropy(logits, row["targets"][0, :end], ignore_index=IGNORE, reduction="sum")
            torch.testing.assert_close(loss, alone, rtol=1e-5, atol=0)
            assert count > 0


def test_what_cannot_be_packed_is_trained_without(bundled_tokenizer: Any, source: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, scope="all")
    packed, apart = (
        prepare(source, bundled_tokenizer, SMALL.row_length, tmp_path / "cache", packing=packing)
        for packing in (True, False)
    )
    with pytest.raises(TrainingError, match=r"OPTForCausalLM lets documents .* see each other: .* --no-packing"):
        train(opt(), *packed, settings, None)
    result = train(opt(), *apart, settings, None)
    assert result.heldout_after < result.heldout_before


def test_records_tell_it_where_it_is_unusual(kallm: Run) -> None:
    assert "packing" not in TrainSettings().described()
    assert TrainSettings(packing=False).described()["packing"] is False
    with pytest.raises(TrainingError, match="packing = false is for chat"):
        TrainSettings(task="classify", packing=False)
    code, out, _ = kallm("train", "--help")
    assert code == 0
    assert "--no-packing" in out
