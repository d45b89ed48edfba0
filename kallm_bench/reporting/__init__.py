"""Tables from records. Knows records and nothing of models; no torch here."""

from kallm_bench.reporting.card import facts_of
from kallm_bench.reporting.chance import EXPLAINED, judged
from kallm_bench.reporting.json_text import to_json
from kallm_bench.reporting.memory import Memory
from kallm_bench.reporting.table import Figure, Row, Table
from kallm_bench.reporting.tables import build_tables
from kallm_bench.reporting.text import grid, to_csv, to_markdown, written

__all__ = [
    "EXPLAINED",
    "Figure",
    "Memory",
    "Row",
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
