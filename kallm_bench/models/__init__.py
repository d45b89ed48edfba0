"""Which model, where its feed-forward parts are, how one is replaced, saved and loaded."""

from kallm_bench.models.checkpoint import load_checkpoint, save_checkpoint
from kallm_bench.models.modeling import specs_of
from kallm_bench.models.retrofit import complete_spec, replaced_modules, retrofit
from kallm_bench.models.sources import Source, find_model, load_config, load_model, load_tokenizer, read_lineage
from kallm_bench.models.spec import KANSpec

__all__ = [
    "KANSpec",
    "Source",
    "complete_spec",
    "find_model",
    "load_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "read_lineage",
    "replaced_modules",
    "retrofit",
    "save_checkpoint",
    "specs_of",
]
