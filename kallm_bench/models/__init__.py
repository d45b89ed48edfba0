"""Which model, where its feed-forward parts are, how one is replaced, saved and loaded."""

from kallm_bench.models.calibration import Calibration, CalibrationSettings, Seen, is_tight
from kallm_bench.models.checkpoint import (
    Original,
    load_checkpoint,
    open_original,
    save_checkpoint,
    stored_dtype,
    write_card,
)
from kallm_bench.models.cut import CutSettings, cut, cut_config
from kallm_bench.models.modeling import context_length, skeleton_of, specs_of
from kallm_bench.models.retrofit import (
    complete_spec,
    parameters_of,
    replaced_modules,
    replaced_sites,
    retrofit,
    retrofit_reporting,
)
from kallm_bench.models.revert import blocks_to_revert, revert
from kallm_bench.models.sources import (
    Source,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    load_weights,
    read_base,
    read_lineage,
    weights_folder,
)
from kallm_bench.models.spec import KANSpec

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "CutSettings",
    "KANSpec",
    "Original",
    "Seen",
    "Source",
    "blocks_to_revert",
    "complete_spec",
    "context_length",
    "cut",
    "cut_config",
    "find_model",
    "is_tight",
    "load_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "open_original",
    "parameters_of",
    "read_base",
    "read_lineage",
    "replaced_modules",
    "replaced_sites",
    "retrofit",
    "retrofit_reporting",
    "revert",
    "save_checkpoint",
    "skeleton_of",
    "specs_of",
    "stored_dtype",
    "weights_folder",
    "write_card",
]
