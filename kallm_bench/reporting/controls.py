"""Which arm is whose control: without one, a KAN's row cannot be read."""

from __future__ import annotations

import bisect
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from kallm_bench.reporting.arms import Arm

MATCHED = 0.02
"""Numbers of parameters that differ by less are called equal."""


class Controls:
    """The linear arms of a table, found by what they have in common with a KAN; each list by size."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._alike: dict[tuple[str, ...], list[Arm]] = defaultdict(list)
        self._loras = [arm for arm in arms if is_lora(arm)]
        for arm in sorted((arm for arm in arms if is_linear(arm)), key=_size):
            for key in _keys(arm):
                self._alike[key].append(arm)

    def of(self, arm: Arm) -> Arm | None:
        """What a KAN is set beside: a linear control trained alike, with as many parameters if there is one.

        One that was asked the same questions, started alike and had the same curriculum comes first; of those without
        as many parameters the largest. An adapter is set beside LoRA, and only of as many parameters.
        """
        if is_adapter(arm):
            return next((other for other in self._loras if _replaces(arm, other)), None)
        if not is_kan(arm):
            return None
        alike: list[Arm] = next((found for key in _keys(arm) if (found := self._alike[key])), [])
        place = bisect.bisect(alike, _size(arm), key=_size)
        near = [other for other in alike[max(place - 1, 0) : place + 1] if matched(arm, other)]
        return min(near, key=lambda other: abs(_size(other) - _size(arm)), default=alike[-1] if alike else None)


def _keys(arm: Arm) -> list[tuple[str, ...]]:
    """How it was trained; with what else it may have in common with another, the most first."""
    asked = json.dumps(arm.settings.get("eval-bbh"), sort_keys=True)
    shared = itertools.product((asked, ""), (_start(arm), ""), (_curriculum(arm), ""))
    return [(_training(arm), *each) for each in shared]


def is_kan(arm: Arm) -> bool:
    return bool(arm.spec) and arm.spec["basis"] not in ("linear", "drop")  # type: ignore[index]


def is_linear(arm: Arm) -> bool:
    return bool(arm.spec) and arm.spec["basis"] == "linear"  # type: ignore[index]


def is_adapter(arm: Arm) -> bool:
    return bool(arm.spec) and arm.spec.get("rank") is not None  # type: ignore[union-attr]


def is_lora(arm: Arm) -> bool:
    """Whether it learned by LoRA on the untouched model."""
    return not arm.specs and arm.settings.get("train", {}).get("scope") == "lora"


def _replaces(adapter: Arm, lora: Arm) -> bool:
    """Whether one stands in the other's place: as many parameters learned as much, and the same was asked."""
    learned = lora.stages["train"][0].value("trainable_parameters") or 0.0
    alike = _lessons(adapter) == _lessons(lora) and adapter.settings.get("eval-bbh") == lora.settings.get("eval-bbh")
    return alike and abs(learned - adapter.replaced_parameters) < MATCHED * learned


def _lessons(arm: Arm) -> dict[str, Any]:
    """How an arm was trained, less what the scope says."""
    settings = arm.settings.get("train", {})
    return {k: v for k, v in settings.items() if k not in ("scope", "tail_from") and not k.startswith("lora_")}


def matched(arm: Arm, other: Arm) -> bool:
    """Whether the modules put in are of the same size."""
    return bool(arm.replaced_parameters) and abs(other.replaced_parameters / arm.replaced_parameters - 1) < MATCHED


def started_alike(arm: Arm, other: Arm) -> bool:
    """Whether the modules put in were given their first values in the same way."""
    return _start(arm) == _start(other)


def _start(arm: Arm) -> str:
    return str((arm.spec or {}).get("start", "random"))


def _size(arm: Arm) -> float:
    return arm.replaced_parameters


def _training(arm: Arm) -> str:
    """How an arm was trained, and for how long before, less its curriculum."""
    settings = arm.settings.get("train", {})
    plain = {key: value for key, value in settings.items() if key != "curriculum"}
    return json.dumps([plain, arm.tokens_before], sort_keys=True)


def _curriculum(arm: Arm) -> str:
    """What of its curriculum a linear arm can have too."""
    curriculum = arm.settings.get("train", {}).get("curriculum") or {}
    return json.dumps({name: curriculum.get(name) for name in ("stages", "anneal")})


def missing_controls(arms: Sequence[Arm]) -> Iterable[str]:
    """Names the controls that the KANs among these arms lack."""
    adapters, loras = [arm for arm in arms if is_adapter(arm)], [arm for arm in arms if is_lora(arm)]
    for adapter in adapters:
        if not any(_replaces(adapter, lora) for lora in loras):
            yield f"LoRA with as many parameters as '{adapter.name}'"
    kans = [arm for arm in arms if is_kan(arm) and not is_adapter(arm)]
    linears = [arm for arm in arms if is_linear(arm)]
    if not kans:
        return
    if all(arm.spec for arm in arms):
        yield "the untouched model"
    if not linears:
        yield "a linear restart"
    ways = [((_teacher(linear), _start(linear)), linear) for linear in linears]
    lacking: dict[str, None] = {}
    for kan in kans:
        teacher, start = _teacher(kan), _start(kan)
        if not any(way == (teacher, start) and matched(kan, linear) for way, linear in ways):
            how = (", started like it" if start != "random" else "") + (", distilled like it" if teacher else "")
            lacking[f"a linear control with as many parameters as '{kan.name}'{how}"] = None
    yield from lacking


def _teacher(arm: Arm) -> Any:
    return arm.settings.get("train", {}).get("distillation")
