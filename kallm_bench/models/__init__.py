"""Which model, where its feed-forward parts are, how one is replaced, saved and loaded."""

from kallm_bench.models.calibration import Calibration, CalibrationSettings
from kallm_bench.models.checkpoint import Original, load_checkpoint, open_original, save_checkpoint, stored_dtype
from kallm_bench.models.modeling import specs_of
from kallm_bench.models.retrofit import complete_spec, parameters_of, replaced_modules, retrofit, retrofit_reporting
from kallm_bench.models.sources import (
    Source,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    read_lineage,
    weights_folder,
)
from kallm_bench.models.spec import KANSpec

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "KANSpec",
    "Original",
    "Source",
    "complete_spec",
    "find_model",
    "load_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "open_original",
    "parameters_of",
    "read_lineage",
    "replaced_modules",
    "retrofit",
    "retrofit_reporting",
    "save_checkpoint",
    "specs_of",
    "stored_dtype",
    "weights_folder",
]
