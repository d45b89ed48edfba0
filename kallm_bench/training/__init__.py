"""Training: conversations to packed rows, what learns, the loss, the loop."""

from kallm_bench.training.curriculum import CurriculumSettings, make_curriculum
from kallm_bench.training.data import DataSource, Rows, find_data, prepare, tokenizer_fingerprint
from kallm_bench.training.fit import Fit
from kallm_bench.training.forward import Forward
from kallm_bench.training.loop import TrainResult, heldout_loss, train
from kallm_bench.training.processes import ALONE, Processes, asked_for, join
from kallm_bench.training.scope import SCOPES, apply_scope, check_scope, parameters_in
from kallm_bench.training.settings import SCHEDULES, TrainSettings
from kallm_bench.training.sharding import gather_into
from kallm_bench.training.teacher import DistillationSettings, Teacher
from kallm_bench.training.trackers import TRACKERS, check_trackers, tracking

__all__ = [
    "ALONE",
    "SCHEDULES",
    "SCOPES",
    "TRACKERS",
    "CurriculumSettings",
    "DataSource",
    "DistillationSettings",
    "Fit",
    "Forward",
    "Processes",
    "Rows",
    "Teacher",
    "TrainResult",
    "TrainSettings",
    "apply_scope",
    "asked_for",
    "check_scope",
    "check_trackers",
    "find_data",
    "gather_into",
    "heldout_loss",
    "join",
    "make_curriculum",
    "parameters_in",
    "prepare",
    "tokenizer_fingerprint",
    "tracking",
    "train",
]
