"""Tables from records. Knows records and nothing of models; no torch here."""

from kallm_bench.reporting.card import facts_of
from kallm_bench.reporting.chance import EXPLAINED, judged
from kallm_bench.reporting.tables import Table, build_tables
from kallm_bench.reporting.text import grid, to_csv, to_json, to_markdown, written

__all__ = [
    "EXPLAINED",
    "Table",
    "build_tables",
    "facts_of",
    "grid",
    "judged",
    "to_csv",
    "to_json",
    "to_markdown",
    "written",
]
