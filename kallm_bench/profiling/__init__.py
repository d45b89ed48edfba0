"""What a model costs on the machine at hand."""

from kallm_bench.profiling.flops import flops_per_token
from kallm_bench.profiling.hardware import environment, find_device, find_dtype, identity
from kallm_bench.profiling.throughput import ProfileSettings, measure_inference, measure_training

__all__ = [
    "ProfileSettings",
    "environment",
    "find_device",
    "find_dtype",
    "flops_per_token",
    "identity",
    "measure_inference",
    "measure_training",
]
