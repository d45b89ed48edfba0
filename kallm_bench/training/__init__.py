"""Training: conversations to packed rows, what learns, the loss, the loop."""

from kallm_bench.training.data import DataSource, Rows, find_data, prepare, tokenizer_fingerprint
from kallm_bench.training.forward import Forward
from kallm_bench.training.loop import TrainResult, TrainSettings, heldout_loss, train
from kallm_bench.training.scope import SCOPES, apply_scope, check_scope, parameters_in

__all__ = [
    "SCOPES",
    "DataSource",
    "Forward",
    "Rows",
    "TrainResult",
    "TrainSettings",
    "apply_scope",
    "check_scope",
    "find_data",
    "heldout_loss",
    "parameters_in",
    "prepare",
    "tokenizer_fingerprint",
    "train",
]
