"""Every arm of every shipped suite, with a small model and a small budget: each runs, and is a row of the report."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_suites import SMALL_MODEL, small, write_texts

from kallm_bench import engine
from kallm_bench.filing import Bench
from kallm_bench.models import save_checkpoint
from kallm_bench.records import ResultsStore
from kallm_bench.suites import read_suite

ROOT = Path(__file__).parent.parent
SUITES = [
    path for path in sorted((ROOT / "suites").glob("*.toml")) if read_suite(path).cells
]  # what layers alone are measured in is nothing for a CPU: see test_profile_kernels.py


@pytest.fixture(scope="module")
def place(tiny_llama: Callable[..., Any], bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and texts, which suites share."""
    folder = tmp_path_factory.mktemp("suites")
    save_checkpoint(folder / "base", tiny_llama(**SMALL_MODEL), bundled_tokenizer)
    write_texts(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_arm_runs_through_its_stages_and_is_a_row_of_the_report(
    place: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALLM_CACHE", str(place / "cache"))
    questions = Path(os.environ.get("KALLM_SHARED", ROOT.parent / "shared")) / "data" / "bbh"
    suite = small(read_suite(path, seeds=[0]), place, questions if questions.is_dir() else None)
    bench = Bench(ResultsStore(tmp_path / "results"), "here", tmp_path / "runs", torch.device("cpu"), torch.float32)
    ran = engine.run_suite(bench, suite)
    assert not ran.failures
    done = {(record.arm, record.stage) for record in ran.records}
    wanted = {(cell.arm, stage) for cell in suite.cells for stage in cell.stages if stage != "retrofit" or cell.spec}
    assert done == wanted
    filed = [record.id for record in bench.store.records(suite.name) if record.stage != "cut"]  # that is of no arm
    assert filed == [record.id for record in ran.records]
    tables = engine.write_report(bench.store, suite, bench.testbed, ran.records).tables
    kind = "starts" if set(suite.cells[0].stages) == {"retrofit"} else "arms"
    (table,) = [table for table in tables if table.kind == kind]
    arms = [cell.arm for cell in suite.cells]
    assert list(dict.fromkeys(row.name for row in table.rows if row.name in arms)) == arms  # beside those of guessing
    assert not [table for table in tables if table.kind == "failures"]
