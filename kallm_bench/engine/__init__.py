"""The one core that every command goes through: settings in, stage called, record out."""

from kallm_bench.engine.cells import check_cell, run_cell
from kallm_bench.engine.costs import profile, profile_kernels, profile_side_by_side, scopes_of
from kallm_bench.engine.cutting import CUT_VERSION, cut_model
from kallm_bench.engine.failures import Ran
from kallm_bench.engine.forecasts import CellForecast, foresee_suite, plan_of
from kallm_bench.engine.lessons import Lessons
from kallm_bench.engine.questions import eval_bbh, write_prompts
from kallm_bench.engine.report import Report, write_report
from kallm_bench.engine.rereading import rescore
from kallm_bench.engine.retrofitting import retrofit, revert
from kallm_bench.engine.starting import START_VERSION
from kallm_bench.engine.suites import run_suite
from kallm_bench.engine.training import FAST_TOKENS, train_model, try_training

__all__ = [
    "CUT_VERSION",
    "FAST_TOKENS",
    "START_VERSION",
    "CellForecast",
    "Lessons",
    "Ran",
    "Report",
    "check_cell",
    "cut_model",
    "eval_bbh",
    "foresee_suite",
    "plan_of",
    "profile",
    "profile_kernels",
    "profile_side_by_side",
    "rescore",
    "retrofit",
    "revert",
    "run_cell",
    "run_suite",
    "scopes_of",
    "train_model",
    "try_training",
    "write_prompts",
    "write_report",
]
