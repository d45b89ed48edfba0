"""What was measured: records, their store, the table of metrics, and the statistics. No torch here."""

from kallm_bench.records.metrics import METRICS, MetricKind, kind_of
from kallm_bench.records.record import WIDE_SPREAD, Artifact, Metric, RunRecord, settings_key
from kallm_bench.records.store import ResultsStore

__all__ = [
    "METRICS",
    "WIDE_SPREAD",
    "Artifact",
    "Metric",
    "MetricKind",
    "ResultsStore",
    "RunRecord",
    "kind_of",
    "settings_key",
]
