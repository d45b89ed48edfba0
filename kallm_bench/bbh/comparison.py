"""A Decoder is believed only where its logits are the model's own: compared on made-up tokens, before any reply."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kallm_bench.bbh.attention import UnsupportedError, replies_attention
from kallm_bench.bbh.decoding import Decoder, Grain, Room
from kallm_bench.bbh.shapes import LayerShape, compiler_errors

PROBED = 40
"""Tokens that are compared on."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}
"""Norm of the difference of logits over the norm of the logits: a few times what rounding does (tf32 in float32). In
bfloat16 it does 5 % on the bundled model; one wrong token among forty does 18 %."""

FOREIGN = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What architectures raise that expect something else than they are given."""


def check(model: PreTrainedModel, layers: Sequence[LayerShape], grain: Grain, fused: bool) -> None:
    """Compares a Decoder's logits with the model's own, of a prompt with a beginning and one without.

    Raises:
        UnsupportedError: they differ, or the architecture does something that a Decoder does not know.
    """
    config = model.config.get_text_config(decoder=True)
    ropes = [getattr(config, "rope_parameters", None) or {}, getattr(config, "rope_scaling", None) or {}]
    flat = itertools.chain(*([rope, *(each for each in rope.values() if isinstance(each, dict))] for rope in ropes))
    if any(rope.get("rope_type") in ("dynamic", "longrope") for rope in flat):
        raise UnsupportedError("rotary frequencies that depend on the length")
    made_up = [(7919 * (each + 1)) % config.vocab_size for each in range(2 * PROBED)]
    shared, rest = made_up[: PROBED // 2], made_up[PROBED // 2 : PROBED]
    other = made_up[PROBED : PROBED + 5]
    grain = dataclasses.replace(grain, block=grain.block if fused else 1)
    errors = FOREIGN + compiler_errors() if fused else FOREIGN
    try:
        decoder = Decoder(model, layers, Room(2 * grain.block, PROBED, PROBED, 1), grain, fused=fused, recorded=False)
        found = _last_logits(decoder, shared, rest, other)
        with torch.inference_mode():
            whole = [torch.tensor([ids], device=model.device) for ids in (shared + rest, other)]
            truth = torch.cat([model(input_ids=ids, use_cache=False).logits[:, -1] for ids in whole])
    except torch.OutOfMemoryError:
        raise
    except errors as error:
        raise UnsupportedError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    found, truth = found.double(), truth.double()
    off = float((found - truth).norm() / (truth - truth.mean()).norm())
    if not off <= TOLERANCE.get(model.dtype, 0.15):
        raise UnsupportedError(f"logits differ by {off:.1%} from the model's own")


def _last_logits(decoder: Decoder, shared: Sequence[int], rest: Sequence[int], other: Sequence[int]) -> Tensor:
    """(2, vocabulary): after `shared` and `rest`, and after `other`. Steps take the last three tokens of each."""
    device, second = decoder.model.device, decoder.grain.block
    decoder.begin(0, shared)
    decoder.share([0], 0)
    decoder.admit({0: rest[:-3]})
    decoder.admit({second: other[:-3]})
    rows = torch.tensor([0, second], device=device)
    with torch.inference_mode(), replies_attention(decoder.model):
        for after in (3, 2, 1):
            decoder.logits(decoder.room.rows, PROBED)
            decoder.tokens[rows] = torch.tensor([rest[-after], other[-after]], device=device)
            decoder.positions[rows] += 1
        return decoder.logits(decoder.room.rows, PROBED)[rows]
