"""Which arm is whose control: without one, a KAN's row cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kallm_bench.reporting.arms import Arm

MATCHED = 0.02
"""Numbers of parameters that differ by less are called equal."""


def control_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """What a KAN is set beside: a linear control trained alike, with as many parameters if there is one."""
    if not is_kan(arm):
        return None
    alike = [other for other in arms if is_linear(other) and _training(other) == _training(arm)]
    alike = [other for other in alike if _start(other) == _start(arm)] or alike
    return next((other for other in alike if matched(arm, other)), max(alike, key=_size, default=None))


def is_kan(arm: Arm) -> bool:
    return bool(arm.spec) and arm.spec["basis"] not in ("linear", "drop")  # type: ignore[index]


def is_linear(arm: Arm) -> bool:
    return bool(arm.spec) and arm.spec["basis"] == "linear"  # type: ignore[index]


def matched(arm: Arm, other: Arm) -> bool:
    """Whether the modules put in are of the same size."""
    return bool(arm.replaced_parameters) and abs(other.replaced_parameters / arm.replaced_parameters - 1) < MATCHED


def _size(arm: Arm) -> float:
    return arm.replaced_parameters


def _start(arm: Arm) -> Any:
    return (arm.spec or {}).get("start", "random")


def _training(arm: Arm) -> dict[str, Any]:
    """How an arm was trained, less what only a KAN's curriculum has."""
    return {key: value for key, value in arm.settings.get("train", {}).items() if key != "curriculum"}


def missing_controls(arms: Sequence[Arm]) -> Iterable[str]:
    """Names the controls that the KANs among these arms lack."""
    kans, linears = [arm for arm in arms if is_kan(arm)], [arm for arm in arms if is_linear(arm)]
    if not kans:
        return
    if all(arm.spec for arm in arms):
        yield "the untouched model"
    if not linears:
        yield "a linear restart"
    for kan in kans:
        teacher = _teacher(kan)
        if not any(matched(kan, linear) for linear in linears if _teacher(linear) == teacher):
            how = ", distilled like it" if teacher else ""
            yield f"a linear control with as many parameters as '{kan.name}'{how}"


def _teacher(arm: Arm) -> Any:
    return arm.settings.get("train", {}).get("distillation")
