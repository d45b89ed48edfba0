"""Scores are lm-eval's own: prompts, log-likelihoods, answers, averages, held against lm-eval itself."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import benchmark_parity
import pytest
import torch

from kallm_bench.bbh.protocols import LM_EVAL_PROTOCOLS, PROTOCOLS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval word2number"
)


def assert_alike(row: benchmark_parity.Parity) -> None:
    assert row.prompts_differ == row.choices_differ == row.readings_differ == 0, row
    assert row.apart <= 1e-4, row
    if row.verdicts_differ == 0:
        assert row.score == pytest.approx(row.lm_eval_score, abs=1e-12)
        assert row.error == pytest.approx(row.lm_eval_error, abs=1e-12)
    assert row.verdicts_differ <= row.too_close + row.replies_differ, row


def test_a_tiny_model_is_scored_as_lm_eval_scores_it(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path
) -> None:
    """All five protocols; greedy replies of a random model may part where two tokens are as likely."""
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=4096)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)
    tasks = ["navigate", "object_counting", "snarks"]
    rows = benchmark_parity.compare(
        model, bundled_tokenizer, tmp_path, shared_data / "data/bbh", list(LM_EVAL_PROTOCOLS), tasks, 3, 12
    )
    assert [row.protocol for row in rows] == list(LM_EVAL_PROTOCOLS)
    for row in rows:
        assert row.questions == 9
        assert_alike(row)
        assert row.replies_differ == 0, row
        assert row.too_close <= 1


@pytest.mark.long
@pytest.mark.parametrize("protocol", LM_EVAL_PROTOCOLS)
def test_the_bundled_model_is_scored_as_lm_eval_scores_it(
    bundled: Any, tmp_path: Path, shared_data: Path, protocol: str
) -> None:
    """Two questions of every task of the protocol, and replies of up to 16 tokens."""
    model, tokenizer = bundled
    tasks = list(PROTOCOLS[protocol].tasks)
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        [row] = benchmark_parity.compare(model, tokenizer, tmp_path, shared_data / "data/bbh", [protocol], tasks, 2, 16)
    finally:
        torch.set_num_threads(1)
    assert row.questions == 2 * len(tasks)
    assert_alike(row)
    assert row.replies_differ <= 1, row
