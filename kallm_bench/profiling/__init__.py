"""What a model costs on the machine at hand."""

from kallm_bench.profiling.flops import flops_per_token
from kallm_bench.profiling.hardware import DTYPES, environment, find_device, find_dtype, identity
from kallm_bench.profiling.kernels import measure_kernels
from kallm_bench.profiling.memory import begin_anew, give_back, only_new_garbage, peak_memory
from kallm_bench.profiling.parts import measure_parts
from kallm_bench.profiling.problems import KernelProblem, KernelSettings, problems_by_hand
from kallm_bench.profiling.ratios import ratios
from kallm_bench.profiling.replays import first_line
from kallm_bench.profiling.rig import Rig, surrounded
from kallm_bench.profiling.room import check_room, too_large
from kallm_bench.profiling.runs import describe_run, heldout_curve
from kallm_bench.profiling.settings import USUAL, ProfileSettings
from kallm_bench.profiling.throughput import measure_inference
from kallm_bench.profiling.training_step import measure_training, no_steps

__all__ = [
    "DTYPES",
    "USUAL",
    "KernelProblem",
    "KernelSettings",
    "ProfileSettings",
    "Rig",
    "begin_anew",
    "check_room",
    "describe_run",
    "environment",
    "find_device",
    "find_dtype",
    "first_line",
    "flops_per_token",
    "give_back",
    "heldout_curve",
    "identity",
    "measure_inference",
    "measure_kernels",
    "measure_parts",
    "measure_training",
    "no_steps",
    "only_new_garbage",
    "peak_memory",
    "problems_by_hand",
    "ratios",
    "surrounded",
    "too_large",
]
