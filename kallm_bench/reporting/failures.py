"""Cells that failed when they were last run: a row for each arm and seed, with the stage and the reason in words."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence

from kallm_bench.records import Ending
from kallm_bench.reporting.table import Row, Table

SEED, STAGE, REASON = "seed", "stage", "why it failed"
"""Headings of its words; layers alone have no seed."""


def failures_table(suite: str, testbed: str, failed: Sequence[Ending]) -> Table:
    """Of one suite and testbed, in the order in which they failed."""
    rows = [Row(each.arm, words={SEED: _seed(each), STAGE: each.stage, REASON: each.reason}) for each in failed]
    below = tuple(_notes(failed))
    return Table(suite, testbed, tuple(rows), below, (), (), kind="failures", words=(SEED, STAGE, REASON))


def failure_notes(failed: Sequence[Ending]) -> Iterator[str]:
    """What the table of arms says of those that are in it or should be."""
    names = [f"{each.arm}, seed {each.seed}" for each in failed if each.stage != "kernels"]
    if names:
        yield f"Failed when last run: {'; '.join(names)}. What stands in this table of them is from before."


def why_missing(row: Row) -> str:
    """Of a row of such a table: "seed 0 failed in train: out of memory"."""
    seed = f"seed {row.words[SEED]} " if row.words[SEED] else ""
    return f"{seed}failed in {row.words[STAGE]}: {row.words[REASON]}"


def _notes(failed: Sequence[Ending]) -> Iterable[str]:
    if failed:
        suite = failed[-1].suite_file or failed[-1].suite
        only = shlex.quote(",".join(dict.fromkeys(each.arm for each in failed)))
        yield f"Run them again: `kallm run {suite} --only {only}`; what is done is not done again."


def _seed(failed: Ending) -> str:
    return "" if failed.stage == "kernels" else str(failed.seed)
