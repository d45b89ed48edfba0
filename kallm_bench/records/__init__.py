"""What was measured: records, their store, the table of metrics, and the statistics. No torch here."""

from kallm_bench.records.endings import Ending, standing_failures
from kallm_bench.records.metrics import METRICS, MetricKind, kind_of
from kallm_bench.records.record import OTHERS, WIDE_SPREAD, Artifact, Metric, RunRecord, settings_key
from kallm_bench.records.store import ResultsStore

__all__ = [
    "METRICS",
    "OTHERS",
    "WIDE_SPREAD",
    "Artifact",
    "Ending",
    "Metric",
    "MetricKind",
    "ResultsStore",
    "RunRecord",
    "kind_of",
    "settings_key",
    "standing_failures",
]
