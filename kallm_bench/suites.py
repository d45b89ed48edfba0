"""A suite: one TOML file that becomes complete cells, one for each arm and seed, or problems for layers alone."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types as types_module
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kallm_bench.bbh.evaluate import EvalSettings
from kallm_bench.errors import KallmError, SuiteError, unknown
from kallm_bench.models import CalibrationSettings, CutSettings, KANSpec
from kallm_bench.profiling import DTYPES, KernelProblem, KernelSettings, ProfileSettings, problems_by_hand
from kallm_bench.suite_files import find_suite
from kallm_bench.training import CurriculumSettings, DistillationSettings, TrainSettings

SECTIONS: dict[str, type] = {
    "cut": CutSettings,
    "calibration": CalibrationSettings,
    "train": TrainSettings,
    "curriculum": CurriculumSettings,
    "distillation": DistillationSettings,
    "eval": EvalSettings,
    "profile": ProfileSettings,
}
"""Tables of a suite, and of an arm where it differs, with the settings each one fills."""


class Use(NamedTuple):
    """Keys of one of SECTIONS that decide something only where its settings are such, in words and as a question."""

    keys: tuple[str, ...]
    where: str
    holds: Callable[[Any], bool]


LORA = tuple(entry.name for entry in dataclasses.fields(TrainSettings) if entry.name.startswith("lora_"))

USES: dict[str, tuple[Use, ...]] = {
    "train": (
        Use(LORA, 'scope = "lora"', lambda train: train.scope == "lora"),
        Use(("decay_share",), 'schedule = "wsd"', lambda train: train.schedule == "wsd"),
        Use(("final_share",), "a schedule that falls", lambda train: train.schedule != "constant"),
    ),
    "curriculum": (
        Use(("stages_over",), "stages", lambda curriculum: bool(curriculum.stages)),
        Use(("anneal_over",), "anneal", lambda curriculum: bool(curriculum.anneal)),
    ),
    "distillation": (Use(("temperature",), "a weight above 0", lambda distillation: distillation.active),),
}
"""What would be silently ignored elsewhere, and is refused: of an arm, and of a suite where no arm uses it."""

DEVICES = ("cpu", "cuda")
"""Tables of these names inside one of SECTIONS hold what is otherwise on such a device: [profile.cpu]."""

SMALL_TOKENS = 1024
"""Rows that kernels are measured on where nothing is said and the device is a CPU."""

STAGES = ("retrofit", "train", "eval-bbh", "profile")


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: everything its stages need.

    Args:
        spec: None for an arm with nothing replaced.
        match: the spec of the arm that `spec` shall have as many parameters as; None where it stands by itself.
        stages: which of STAGES are run.
        evals: the ways that questions are asked, each once.
        after: the cell whose retrofitted and trained model this one starts from, if not from the suite's own.
        dtype: that it computes in, a key of DTYPES; "" for what the command says.
        cut: what is left of the model before anything else is done, if not all.
    """

    arm: str
    seed: int
    model: str
    spec: KANSpec | None
    match: KANSpec | None
    stages: tuple[str, ...]
    cut: CutSettings
    calibration: CalibrationSettings
    train: TrainSettings
    curriculum: CurriculumSettings
    distillation: DistillationSettings
    evals: tuple[EvalSettings, ...]
    profile: ProfileSettings
    after: Cell | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Suite:
    """What a file asks for.

    Args:
        cells: all arms of the first seed, then of the next.
        arms: all that its file names, problems among them, also those that were not wanted this time.
        kernels: problems that layers are measured on by themselves, see KernelSettings; they have no seeds.
    """

    name: str
    description: str
    cells: tuple[Cell, ...]
    arms: tuple[str, ...]
    kernels: tuple[KernelProblem, ...] = ()


def read_suite(
    path: Path,
    only: Iterable[str] = (),
    seeds: Iterable[int] | None = None,
    model: str | None = None,
    data: str | None = None,
    heldout: str | None = None,
    stages: Iterable[str] = (),
    device: str = "",
) -> Suite:
    """The suite in a TOML file.

    Args:
        only: names of the arms to keep; none named keeps all.
        seeds, model: in place of the file's own.
        data, heldout: in place of the suite's own, in training, in calibration and in the cut of a vocabulary; data
            without held-out data holds out a part of itself. What an arm names for itself stays.
        stages: names of the stages to keep; none named keeps all.
        device: one of DEVICES, whose own tables count; where it has none, and for "", all is as for any.

    Raises:
        SuiteError: not TOML, an unknown key (with the nearest one), an arm twice, a value of the wrong type, a stage
            that the file does not have.
        KallmError: a setting that cannot be, as its own dataclass says.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: {error}") from error
    _refuse_unknown(
        content, {"description", "model", "dtype", "seeds", "stages", "once", "arm", "kernels", *SECTIONS}, str(path)
    )
    top: dict[str, Any] = {
        "description": "", "model": "", "dtype": "", "seeds": [0], "stages": ["train"], "once": ["profile"], "arm": [{}]
    }  # fmt: skip
    for key, like in (top | {section: {} for section in SECTIONS}).items():
        _check_like(content, key, like, str(path))
    arms = content.get("arm", [])
    problems = _problems(content.get("kernels", []), str(path))
    if not (arms or problems) or not all(
        isinstance(arm, dict) and re.fullmatch(r"[\w.+-]+", str(arm.get("name", ""))) for arm in arms
    ):
        raise SuiteError(f"{path}: needs [[arm]] tables, each with a 'name' of letters, digits, '-', '_', '.' and '+'")
    for table in (content, *arms):
        _settle(table, device, str(path))
    _replace(content, model, data, heldout)
    for stage in (*content.get("stages", []), *content.get("once", [])):
        if stage not in STAGES:
            raise SuiteError(f"{path}: {unknown('stage', str(stage), STAGES)}")
    stages = list(stages)
    for stage in stages:
        if stage not in STAGES:
            raise SuiteError(unknown("stage", stage, STAGES))
        if stage not in (own := content.get("stages", STAGES)):
            raise SuiteError(f"suite '{path.stem}' has no stage '{stage}', it has {', '.join(own)}")
    names = [arm["name"] for arm in arms] + [problem.arm for problem in problems]
    if len(set(names)) < len(names):
        raise SuiteError(f"{path}: two arms have one name; it has {names}")
    named, chosen = (str(path), list(content.get("seeds", [0]))) if seeds is None else ("--seeds", list(seeds))
    if not chosen or not all(type(seed) is int and 0 <= seed < 2**32 for seed in chosen):
        raise SuiteError(f"{named}: seeds should be whole numbers from 0 to {2**32 - 1}, at least one, got {chosen}")
    if len(set(chosen)) < len(chosen):
        raise SuiteError(f"{named}: a seed stands twice in {chosen}")
    for name in only:
        if name not in names:
            raise SuiteError(unknown("arm", name, names))
    wanted = [arm for arm in arms if not only or arm["name"] in set(only)]
    cells = tuple(
        dataclasses.replace(_cell(arm, seed, content, path), stages=_stages(content, stages, seed == chosen[0]))
        for seed in chosen
        for arm in wanted
    )
    if not only:
        _refuse_unused(content, cells, str(path))
    kernels = tuple(problem for problem in problems if not only or problem.arm in set(only))
    return Suite(path.stem, content.get("description", ""), cells, tuple(names), kernels)


def _stages(suite: dict[str, Any], wanted: Sequence[str], first: bool) -> tuple[str, ...]:
    """Of a cell of the first seed, or of a later one, which is spared what the suite wants `once`."""
    spared = () if first else suite.get("once", [])
    return tuple(each for each in suite.get("stages", STAGES) if each not in spared and (each in wanted or not wanted))


def _settle(table: dict[str, Any], device: str, where: str) -> None:
    """Puts what the sections of a suite, or of an arm, say of this device in place of what they say of any."""
    for name, kind in SECTIONS.items():
        if not isinstance(section := table.get(name), dict):
            continue
        for each in DEVICES:
            _check_like(section, each, {}, f"{where}, [{name}]")
            _refuse_unknown(section.get(each, {}), set(typing.get_type_hints(kind)) - {"seed"}, f"{where}, [{name}]")
        own = section.get(device, {})
        table[name] = {key: value for key, value in section.items() if key not in DEVICES} | own


def _replace(content: dict[str, Any], model: str | None, data: str | None, heldout: str | None) -> None:
    """Puts what a command names in the place of what a suite does; its paths start where the command is run."""
    if heldout and not data:
        raise SuiteError("other held-out data needs other data beside it: pass --data too")
    if model:
        content["model"] = _here(model)
    for section in ("train", "calibration") if data else ():
        own = {key: value for key, value in content.get(section, {}).items() if key != "heldout"}
        content[section] = own | {"data": _here(str(data))} | ({"heldout": _here(heldout)} if heldout else {})
    if data and content.get("cut", {}).get("data"):  # whose tokens stay has to be what is learned from
        content["cut"] = content["cut"] | {"data": _here(data)}


def _here(name: str) -> str:
    return str(Path(name).resolve()) if name.startswith(("./", "../")) else name


class Asked(NamedTuple):
    """Problems to measure, the suite they are filed under, how the user named it, and what to tell first."""

    problems: tuple[KernelProblem, ...]
    suite: str
    suite_file: str = ""
    note: str = ""


def choose_kernels(
    suite: str | None,
    shapes: Sequence[str],
    bases: Sequence[str],
    tokens: int | None,
    repeats: int | None,
    on_cpu: bool,
) -> Asked:
    """What to measure: a suite's problems, or those of some shapes and bases, or what this device does in minutes.

    Raises:
        SuiteError: no such suite, or one without kernels; what KernelSettings refuses.
    """
    if suite or not (shapes or bases or tokens or on_cpu):
        read = read_suite(find_suite(suite or "kernels"))
        if not read.kernels:
            raise SuiteError(f"suite '{read.name}' has no [[kernels]]; `kallm run {suite}` does what it says")
        problems = [dataclasses.replace(problem, repeats=repeats or problem.repeats) for problem in read.kernels]
        return Asked(tuple(problems), read.name, suite or "kernels")
    note = "On a CPU 1,024 tokens are enough; --tokens takes others, --suite kernels what a GPU is given."
    chosen = problems_by_hand(shapes, bases, tokens or (SMALL_TOKENS if on_cpu else KernelSettings.tokens), repeats)
    return Asked(chosen, "manual", note=note if on_cpu and tokens is None else "")


def _problems(tables: Any, where: str) -> tuple[KernelProblem, ...]:
    """Of [[kernels]] tables, or of the one table [kernels]."""
    groups = [tables] if isinstance(tables, dict) else tables
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise SuiteError(f"{where}: kernels should be tables, [[kernels]], got {tables!r}")
    return tuple(
        problem for group in groups for problem in _settings(KernelSettings, group, f"{where}, [kernels]").problems()
    )


def _cell(arm: dict[str, Any], seed: int, suite: dict[str, Any], path: Path, later: tuple[str, ...] = ()) -> Cell:
    """The cell of an arm; `later` names those that start after it."""
    here = f"{path}, arm '{arm['name']}'"
    spec_fields = {entry.name for entry in dataclasses.fields(KANSpec)} - {"seed"}
    _refuse_unknown(arm, {"name", "after", "dtype", *spec_fields, *SECTIONS}, here)
    dtype = arm.get("dtype", suite.get("dtype", ""))
    if dtype and dtype not in DTYPES:
        raise SuiteError(f"{here}: {unknown('dtype', str(dtype), DTYPES)}")
    after = None
    if "after" in arm:
        others = {each["name"]: each for each in suite["arm"] if each["name"] not in (*later, arm["name"])}
        if arm["after"] not in others:
            raise SuiteError(f"{here}: {unknown('arm to start after', str(arm['after']), others)}")
        after = _cell(others[arm["after"]], seed, suite, path, (*later, arm["name"]))
    for name in SECTIONS:
        _check_like(arm, name, {}, here)
    spec = match = None
    if "basis" in arm:
        spec, match = _spec(arm, seed, suite, here), None
        if isinstance(arm.get("params"), str) and arm["params"] != "original":
            match = _matched(arm, seed, suite, here)
    elif extra := spec_fields & set(arm):
        raise SuiteError(f"{here}: has {', '.join(sorted(extra))} but no basis, so nothing would be replaced")
    given = {name: {**suite.get(name, {}), **arm.get(name, {})} for name in SECTIONS}
    evals = _evals(given.pop("eval"), f"{here}, [eval]", path)
    settings = {name: _settings(SECTIONS[name], values, f"{here}, [{name}]") for name, values in given.items()}
    train = settings["train"]
    settings["train"] = dataclasses.replace(
        train, seed=seed, data=_beside(path, train.data), heldout=train.heldout and _beside(path, train.heldout)
    )
    kept = settings["cut"]
    settings["cut"] = dataclasses.replace(kept, data=kept.data and _beside(path, kept.data))
    text = settings["calibration"]
    settings["calibration"] = dataclasses.replace(
        text, data=_beside(path, text.data), heldout=text.heldout and _beside(path, text.heldout)
    )
    stages = tuple(suite.get("stages", STAGES))
    cell = Cell(
        arm["name"],
        seed,
        _beside(path, suite.get("model", "bundled")),
        spec,
        match,
        stages,
        evals=evals,
        **settings,
        after=after,
        dtype=dtype,
    )
    _refuse_unused(arm, [cell], here)
    return cell


def _evals(values: dict[str, Any], where: str, path: Path) -> tuple[EvalSettings, ...]:
    """One for each protocol that is named."""
    named = values.get("protocol", EvalSettings.protocol)
    protocols = named if isinstance(named, list) else [named]
    if not protocols or len({str(each) for each in protocols}) < len(protocols):
        raise SuiteError(f"{where}: protocol should name one or several, each once, got {named}")
    found = [_settings(EvalSettings, values | {"protocol": each}, where) for each in protocols]
    return tuple(dataclasses.replace(each, source=each.source and _beside(path, each.source)) for each in found)


def _spec(arm: dict[str, Any], seed: int, suite: dict[str, Any], here: str) -> KANSpec:
    if "blocks" not in arm:
        raise SuiteError(f'{here}: has a basis but no blocks; write blocks = "25-29"')
    names = {other["name"] for other in suite["arm"]}
    fields = {entry.name for entry in dataclasses.fields(KANSpec)} - {"seed"}
    given = {key: value for key, value in arm.items() if key in fields}
    if (wanted := given.get("params")) != "original" and isinstance(wanted, str) and wanted in names:
        del given["params"]
    with _located(here):
        return KANSpec(seed=seed, **given)


def _matched(arm: dict[str, Any], seed: int, suite: dict[str, Any], here: str) -> KANSpec:
    """The spec of the arm that this one shall have as many parameters as."""
    others = {other["name"]: other for other in suite["arm"] if other["name"] != arm["name"]}
    other = others.get(arm["params"], {})
    if "basis" not in other or (other.get("params", "original") != "original" and not isinstance(other["params"], int)):
        raise SuiteError(f"{here}: params names '{arm['params']}', which is no arm with a size of its own")
    return _spec(other, seed, suite, here)


def _beside(suite: Path, name: str) -> str:
    """A path that a suite's file names by ./ or ../ starts at that file, wherever the command is run."""
    return str((suite.parent / name).resolve()) if name.startswith(("./", "../")) else name


def _settings(kind: type, values: dict[str, Any], where: str) -> Any:
    types = typing.get_type_hints(kind)
    _refuse_unknown(values, set(types) - {"seed"}, where)
    values = {key: _frozen(value) for key, value in values.items()}
    for key, value in values.items():
        wanted = typing.get_args(types[key]) if isinstance(types[key], types_module.UnionType) else (types[key],)
        plain = tuple(typing.get_origin(each) or each for each in wanted)
        number = isinstance(value, int) and float in plain
        if not (bool in plain if isinstance(value, bool) else isinstance(value, plain) or number):
            names = " or ".join(each.__name__ for each in plain if each is not type(None))
            raise SuiteError(f"{where}: {key} should be of type {names}, got {value!r}")
    with _located(where):
        return kind(**values)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Puts before an error about values where in the suite they stand."""
    try:
        yield
    except KallmError as error:
        raise type(error)(f"{where}: {error}") from error


def _frozen(value: Any) -> Any:
    """A list as a tuple, and so what is in it."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_like(table: dict[str, Any], key: str, like: Any, where: str) -> None:
    if key in table and not isinstance(table[key], type(like)):
        raise SuiteError(f"{where}: {key} should be like {like!r}, got {table[key]!r}")


def _refuse_unused(table: dict[str, Any], cells: Sequence[Cell], where: str) -> None:
    """Asks whether what a suite, or an arm, says of USES decides something in one of its cells. SuiteError if not."""
    for section, uses in USES.items():
        for use in uses:
            named = [key for key in use.keys if key in table.get(section, {})]
            if named and not any(use.holds(getattr(cell, section)) for cell in cells):
                raise SuiteError(f"{where}, [{section}]: {', '.join(named)} would decide nothing without {use.where}")


def _refuse_unknown(table: dict[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise SuiteError(f"{where}: {unknown('key', key, known)}")
