"""Prompts as the generation engine takes them: in tokens, cut to the context, with the beginning that many share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kallm_bench.bbh.encoding import Encoder, Tokens, context_of, room_for, tokens_of
from kallm_bench.bbh.prompts import Prompt
from kallm_bench.bbh.stops import Ending
from kallm_bench.errors import BBHError

SHORTEST_BEGINNING = 64
"""Tokens of a beginning that is worth sharing: replies with different beginnings never share a block."""


@dataclass(frozen=True)
class Job:
    """A prompt in tokens: the beginning it shares, maybe empty, and its own, at least one.

    Args:
        number: of the prompt, in the sequence that was given.
        group: the same number for the same beginning.
        cut_tokens: how many were cut from the left, because the prompt and its reply exceed the model's context.
    """

    number: int
    group: int
    beginning: Tokens
    own: Tokens
    ending: Ending
    cut_tokens: int

    @property
    def tokens(self) -> Tokens:
        return self.beginning + self.own


def make_jobs(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Job]:
    """The prompts in tokens. A beginning is shared as far as its tokens are the same with and without a question.

    Raises:
        BBHError: an empty prompt, or more new tokens than the model's context has room for.
    """
    context = context_of(model, tokenizer)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    tokens = frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)
    jobs = []
    groups: dict[Tokens, tuple[int, Tokens]] = {}
    for number, (prompt, (ids, beginning)) in enumerate(zip(prompts, _encode(tokenizer, prompts), strict=True)):
        if not ids:
            raise BBHError(f"{prompt.task} {prompt.index}: the prompt is empty")
        if prompt.max_new_tokens < 1:
            raise BBHError(
                f"{prompt.task} {prompt.index}: {prompt.max_new_tokens} new tokens; a reply has one at least"
            )
        cut = max(0, len(ids) - room_for(prompt, context))
        shared = 0 if cut else _agreeing(ids[:-1], beginning)
        shared = shared if shared >= SHORTEST_BEGINNING else 0
        group, common = groups.setdefault(ids[:shared], (len(groups), ids[:shared]))
        ending = Ending(tokens, tuple(stop for stop in prompt.stops if stop), prompt.max_new_tokens)
        jobs.append(Job(number, group, common, ids[cut + shared :], ending, cut))
    return jobs


def _encode(tokenizer: Any, prompts: Sequence[Prompt]) -> list[tuple[Tokens, Tokens]]:
    """Prompts in tokens, each with what the beginning that it shares comes to by itself."""
    encoder = Encoder(tokenizer)
    alike: dict[tuple[str, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        alike.setdefault((prompt.shared, prompt.templated), []).append(number)
    found: dict[int, tuple[Tokens, Tokens]] = {}
    for (shared, templated), numbers in alike.items():
        [beginning] = tokens_of(tokenizer, [shared], templated) if shared else [()]
        cut = encoder.contexts([prompts[number].text for number in numbers], len(shared), templated)
        found |= {number: (tokens, beginning) for number, tokens in zip(numbers, cut, strict=True)}
    return [found[number] for number in range(len(prompts))]


def _agreeing(ids: Sequence[int], beginning: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    if ids[: len(beginning)] == beginning:  # nearly always, and a thousand times as fast
        return len(beginning)
    return next(
        (at for at, (one, other) in enumerate(zip(ids, beginning, strict=False)) if one != other),
        min(len(ids), len(beginning)),
    )
