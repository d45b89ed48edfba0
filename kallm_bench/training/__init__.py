"""Training: conversations or labelled texts to packed rows, what learns, the loss, the loop."""

from kallm_bench.training.checks import check_context
from kallm_bench.training.classify import CLASSIFIER, Answers, answer, check_head, put_head, read_head, write_head
from kallm_bench.training.curriculum import CurriculumSettings, make_curriculum
from kallm_bench.training.data import DataSource, Rows, find_data, prepare, tokenizer_fingerprint
from kallm_bench.training.fit import Fit
from kallm_bench.training.forward import Forward
from kallm_bench.training.loop import TrainResult, heldout_loss, train
from kallm_bench.training.processes import ALONE, Processes, asked_for, join
from kallm_bench.training.scope import SCOPES, ClassHead, apply_scope, check_scope, merge, parameters_in
from kallm_bench.training.settings import SCHEDULES, TASKS, TrainSettings
from kallm_bench.training.sharding import gather_into
from kallm_bench.training.tables import DataTable
from kallm_bench.training.teacher import DistillationSettings, Teacher
from kallm_bench.training.texts import LabelledRows, find_texts, prepare_texts, used_tokens
from kallm_bench.training.trackers import TRACKERS, check_trackers, tracking

__all__ = [
    "ALONE",
    "CLASSIFIER",
    "SCHEDULES",
    "SCOPES",
    "TASKS",
    "TRACKERS",
    "Answers",
    "ClassHead",
    "CurriculumSettings",
    "DataSource",
    "DataTable",
    "DistillationSettings",
    "Fit",
    "Forward",
    "LabelledRows",
    "Processes",
    "Rows",
    "Teacher",
    "TrainResult",
    "TrainSettings",
    "answer",
    "apply_scope",
    "asked_for",
    "check_context",
    "check_head",
    "check_scope",
    "check_trackers",
    "find_data",
    "find_texts",
    "gather_into",
    "heldout_loss",
    "join",
    "make_curriculum",
    "merge",
    "parameters_in",
    "prepare",
    "prepare_texts",
    "put_head",
    "read_head",
    "tokenizer_fingerprint",
    "tracking",
    "train",
    "used_tokens",
    "write_head",
]
