"""How cells ended that failed. Records tell of stages that succeeded; why one did not is noted beside them.

A note is a small JSON file, never changed and never removed, like a record. That a cell went well after all is another
note, or the record of what had failed: the newest word counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from kallm_bench.errors import RecordError
from kallm_bench.records.record import RunRecord, check_types

SCHEMA = 1

FIRST_STAGE = "retrofit"
"""Where a cell begins, also one that replaces nothing: any record of it says that it came past this."""


@dataclass(frozen=True)
class Ending:
    """How a cell, or a problem for layers alone, ended.

    Args:
        id: unique; begins with the time of the ending.
        suite, arm, seed, testbed: which cell, where.
        stage: in which it ended.
        ended: UTC, to the microsecond.
        reason: one line of why it failed; empty where it went well after it had failed.
        suite_file: how the user named the suite.
    """

    id: str
    suite: str
    arm: str
    seed: int
    testbed: str
    stage: str
    ended: str
    reason: str
    suite_file: str = ""
    schema: int = field(default=SCHEMA)

    @property
    def cell(self) -> tuple[str, str, str, int]:
        """Testbed, suite, arm and seed."""
        return self.testbed, self.suite, self.arm, self.seed

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ending:
        """The ending that `to_json` wrote.

        Raises:
            RecordError: not one, or one of another schema; says which.
        """
        try:
            data = json.loads(text)
            check_types(data, Ending, "the ending")
            if data["schema"] != SCHEMA:
                raise RecordError(f"written in schema {data['schema']}, this program reads {SCHEMA}")
            return cls(**data)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecordError(f"not the ending of a cell: {error}") from error


def standing_failures(endings: Iterable[Ending], records: Iterable[RunRecord]) -> list[Ending]:
    """Of each cell that failed when it was last run, that failure; the oldest first.

    A cell that failed and was run again until a stop has not ended, but where the stage that had failed has left a
    record since, that failure is over. Compared are times of one machine's clock.
    """
    newest = {each.cell: each for each in sorted(endings, key=_in_time)}
    failed = {cell: each for cell, each in newest.items() if each.reason}
    for record in records if failed else ():
        cell = (record.testbed, record.suite, record.arm, record.seed)
        failure = failed.get(cell)
        if failure and failure.stage in (record.stage, FIRST_STAGE) and record.started > failure.ended:
            del failed[cell]
    return sorted(failed.values(), key=_in_time)


def _in_time(ending: Ending) -> tuple[str, str]:
    return ending.ended, ending.id
