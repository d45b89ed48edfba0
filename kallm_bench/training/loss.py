"""Cross-entropy at the positions that bear loss, without ever holding a whole row's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kallm_bench.training.data import IGNORE

CHUNK = 1024
"""Positions whose logits exist at one time: 1,024 × 49,152 in float32 are 192 MiB."""


def loss_sum(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross-entropy of a batch of Rows.batch, and the number of positions it is summed over.

    The decoder runs once; its head runs on the positions that bear loss, a chunk at a time, and again in backward, so
    that no chunk's logits are kept. Documents packed into a row do not see each other: transformers builds that mask
    from position_ids that start again, where no attention mask is given.
    """
    decoder = model.get_decoder()
    hidden = decoder(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
    bears_loss = batch["targets"] != IGNORE
    hidden, targets = hidden[bears_loss], batch["targets"][bears_loss]  # (P, H), (P,)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), CHUNK):
        part = hidden[start : start + CHUNK], targets[start : start + CHUNK]
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, model, *part, use_reentrant=False)
        else:
            total = total + _chunk_loss(model, *part)
    return total, len(targets)


def _chunk_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(_logits(model, hidden).float(), targets, reduction="sum")


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The head, with what some families do around it (Cohere and Granite scale, Gemma 2 caps)."""
    config = model.config.get_text_config(decoder=True)
    logits: Tensor = model.get_output_embeddings()(hidden)
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def agrees_with_model(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether decoder and head, as used here, give the model's own logits. (B, T) token ids."""
    own = model(input_ids=input_ids, use_cache=False).logits
    ours = _logits(model, model.get_decoder()(input_ids=input_ids, use_cache=False)[0])
    tolerance = 1e-3 * float(own.nan_to_num().abs().max())
    return bool(torch.allclose(own.float(), ours.float(), atol=tolerance, equal_nan=True))


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether a document packed behind another is left alone by it. (1, T) token ids, T even: two documents of T/2."""
    half = input_ids.shape[1] // 2
    positions = torch.arange(half, device=input_ids.device).repeat(2)[None]
    changed = torch.cat([input_ids[:, :half].flip(1) + 1, input_ids[:, half:]], dim=1)
    first, second = (
        model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)[0][:, half:].nan_to_num()
        for ids in (input_ids, changed % model.get_input_embeddings().num_embeddings)
    )
    return bool(torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max())))
