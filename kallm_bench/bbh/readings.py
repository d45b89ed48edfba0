"""What a reply, or the likelihoods of the choices, come to: the answer, and whether it is right."""

from __future__ import annotations

from collections.abc import Sequence

from kallm_bench.bbh.extraction import is_right, read_answer
from kallm_bench.bbh.fixed_reading import read_fixed
from kallm_bench.bbh.lm_eval_reading import INVALID, answers, cut
from kallm_bench.bbh.protocols import OWN_READING, Protocol
from kallm_bench.bbh.tasks import Question


def read_reply(protocol: Protocol, reading: str, question: Question, reply: str) -> tuple[str | None, bool]:
    """The answer that a reply gives, None where it gives none, and whether that is the target.

    The reply is cut at what ends it in this reading first. lm-eval's stops cut nowhere later than the fixed reading's,
    so what was generated for the fixed reading can be read as lm-eval would have, too.

    Args:
        reading: one that the protocol has.
    """
    reply = cut(reply, protocol.stops[reading])
    if reading == OWN_READING:
        answer = read_answer(question, reply)
        return answer, is_right(question, answer)
    if reading == "lm-eval":
        found, right = next(iter(answers(protocol.name, question, reply).values()))
        return None if found == INVALID else found, right
    answer = read_fixed(protocol.name, question, reply)
    return answer, answer is not None and answer == question.target


def by_likelihood(choices: Sequence[str], loglikelihoods: Sequence[float]) -> list[int]:
    """The numbers of choices by their log-likelihood a character, the highest first, as lm-eval's acc_norm takes it.

    Args:
        choices: without the space before them, which is not counted; of equal ones the first comes first.
        loglikelihoods: in nats, of each.
    """
    each = [value / len(choice) for choice, value in zip(choices, loglikelihoods, strict=True)]
    return sorted(range(len(each)), key=lambda number: -each[number])
