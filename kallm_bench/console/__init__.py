"""The only room that prints: progress and errors to standard error, results to standard output."""

from kallm_bench.console.display import Display, Lines
from kallm_bench.console.figures import show_records
from kallm_bench.console.forecasts import show_cells, show_forecast, show_training
from kallm_bench.console.grids import show_pairs, show_rows
from kallm_bench.console.reports import show_published, show_tables
from kallm_bench.console.streams import fail, prepare, say, show_json, stream, tell

__all__ = [
    "Display",
    "Lines",
    "fail",
    "prepare",
    "say",
    "show_cells",
    "show_forecast",
    "show_json",
    "show_pairs",
    "show_published",
    "show_records",
    "show_rows",
    "show_tables",
    "show_training",
    "stream",
    "tell",
]
