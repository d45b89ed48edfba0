"""What is asked of a model before it is trained: whether it reads such rows, and comes apart where it has to."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.errors import TrainingError
from kallm_bench.models import context_length
from kallm_bench.training.loss import logits_of


def check_context(config: PreTrainedConfig, row_length: int, whose: str = "the model") -> None:
    """Asks whether a model reads as many tokens as a row has, all of which may be of one document.

    Args:
        whose: how it is called in the error.

    Raises:
        TrainingError: it reads fewer.
    """
    most = context_length(config)
    if most is not None and most < row_length:
        raise TrainingError(
            f"rows of {row_length} tokens are longer than {whose} reads at once; take rows of at most {most} tokens"
        )


@torch.no_grad()
def agrees_with_model(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether decoder and head, as used here, give the model's own logits. (B, T) token ids."""
    own = model(input_ids=input_ids, use_cache=False).logits
    try:
        ours = logits_of(model, model.get_decoder()(input_ids=input_ids, use_cache=False)[0])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # there is a layer between the two, or what is called the decoder is none
        return False
    tolerance = 1e-3 * float(own.nan_to_num().abs().max())
    return bool(torch.allclose(own.float(), ours.float(), atol=tolerance, equal_nan=True))


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether a document packed behind another is left alone by it. (1, T) token ids, T even: two documents of T/2."""
    half = input_ids.shape[1] // 2
    input_ids = input_ids[:, : 2 * half]
    positions = torch.arange(half, device=input_ids.device).repeat(2)[None]
    changed = torch.cat([input_ids[:, :half].flip(1) + 1, input_ids[:, half:]], dim=1)
    first, second = (
        model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)[0][:, half:].nan_to_num()
        for ids in (input_ids, changed % model.get_input_embeddings().num_embeddings)
    )
    return bool(torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max())))
