"""The modelling file in a checkpoint, for loading it where kallm_bench is not: one file of plain PyTorch.

It is cut out of this package's own sources each time, so that there is no second copy of the mathematics to keep. What
it needs is found from ROOTS and the bases of the model, definition by definition: a name that a kept definition uses is
kept, and a method whose name nothing kept mentions is not. The sources are read, never run, and copied as they stand.
What cannot be cut so (a name that two modules define, a module imported whole, work at import) stops with an assertion
that says where: it is this package that must change then.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import symtable
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kallm_bench
from kallm_bench.kan import BASES
from kallm_bench.models.spec import KANSpec

ROOTS = (("kallm_bench.models.modeling", "KallmConfig"), ("kallm_bench.models.modeling", "KallmForCausalLM"))
"""Module and name of what transformers asks the file for."""

INSTEAD = {
    "kallm_bench.kan.ops": "kallm_bench.kan.reference",
    "kallm_bench.models.standalone": "kallm_bench.models.copied",
}
"""Modules that the file does without, and those whose functions of the same names it takes."""

CALLED_FROM_OUTSIDE = {"forward", "extra_repr", "from_pretrained", "_from_config", "register_for_auto_class"}
"""Methods that PyTorch and transformers call by name."""

LEFT_OUT = {"reset_parameters"}
"""Methods that only draw first values, which a checkpoint brings along; calls of them go too."""

INSTALLED = {"torch", "transformers", *sys.stdlib_module_names}
"""What the file may import."""

HEADER = '''"""The model in this folder, in plain PyTorch, for an environment without kallm_bench:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

kallm_bench {version} cut this file out of its own sources when it saved the checkpoint. Left out is what loading does
not need: kernels, training, the drawing of first values. The file holds no trained values, those are in the safetensors
beside it; so a model made from config.json alone has memory as it was found in place of KAN coefficients. It opens no
connection and runs no other program; it writes only where `save_pretrained` is told to.

SPDX-License-Identifier: Apache-2.0
"""
'''

Key = tuple[str, str]
"""A definition: its module and the name it defines there."""

Import = tuple[str, str, str]
"""An import: its module, the name taken from it ("" for the module itself), and the name it goes by."""


def modeling_file(specs: Sequence[KANSpec]) -> str | None:
    """The text of `modeling_kallm.py` for a model that had these retrofits; it knows no basis but theirs.

    None where a basis was defined outside this package: what its code needs cannot be told.
    """
    names = {part for spec in specs if spec.is_basis for part in re.split("[+>]", spec.basis)}
    families = sorted({name.partition(":")[0] for name in names})
    own = all(BASES[family].__module__.startswith("kallm_bench.") for family in families)
    return _text_for(tuple(families)) if own else None


@functools.cache
def _text_for(families: tuple[str, ...]) -> str:
    classes = [(BASES[family].__module__, BASES[family].__qualname__) for family in families]
    kept = _reachable([*ROOTS, *classes])
    text = _assembled(kept)
    _check(text)
    return text


@dataclass
class Definition:
    """A top-level function, class or constant as the file will have it.

    Args:
        text: its source, without the methods that are not kept.
        line: where it begins in its module.
        ours: the definitions of this package that it uses.
        imports: what else it imports.
    """

    text: str
    line: int
    ours: set[Key] = field(default_factory=set)
    imports: set[Import] = field(default_factory=set)


def _reachable(wanted: Iterable[Key]) -> dict[Key, Definition]:
    """All that `wanted` need. Methods are kept by name, so each that is found may bring others: until none does."""
    wanted, mentioned = list(wanted), set(CALLED_FROM_OUTSIDE)
    while True:
        kept: dict[Key, Definition] = {}
        ahead = list(wanted)
        while ahead:
            key = ahead.pop()
            if key not in kept:
                kept[key] = _cut(key, mentioned)
                ahead.extend(kept[key].ours)
        found = mentioned | {name for definition in kept.values() for name in _attributes(definition.text)}
        if found == mentioned:
            return kept
        mentioned = found


def _cut(key: Key, mentioned: set[str]) -> Definition:
    """A definition without the methods that nothing mentions, and what it uses."""
    module = _read(key[0])
    assert not module.works, f"{module.name} does more than define: put that where nothing of it is needed"
    node, comment = module.definitions[key[1]]
    lines = module.text.splitlines()
    gone: set[int] = set()
    for part in [*_methods_without(node, mentioned), *_calls_left_out(node)]:
        first = _first_line(part)
        while not lines[first - 2].strip():
            first -= 1
        gone |= set(range(first, (part.end_lineno or first) + 1))
    first, last = _first_line(node), (comment or node).end_lineno or 0
    while lines[first - 2].startswith("#"):
        first -= 1
    text = "\n".join(lines[number - 1] for number in range(first, last + 1) if number not in gone)
    definition = Definition(_without_marks(text), first)
    for name in _names_used(definition.text) - {key[1]}:
        _resolve(module, name, definition)
    return definition


def _resolve(module: Module, name: str, definition: Definition) -> None:
    """Notes where a name that a definition uses comes from."""
    if name in module.definitions:
        definition.ours.add((module.name, name))
    elif name in module.imports:
        source, original, _ = module.imports[name]
        if source.split(".")[0] != "kallm_bench":
            definition.imports.add(module.imports[name])
            return
        assert original == name, f"{module.name}: import {original} under its own name, not as {name}"
        there = _read(INSTEAD.get(source, source))
        assert name in there.definitions or name in there.imports, f"{module.name}: {name} of {source} is no definition"
        _resolve(there, name, definition)
    else:
        known = hasattr(builtins, name) or (name.startswith("__") and name.endswith("__"))
        assert known, f"{module.name}: where does {name} come from?"


@dataclass(frozen=True)
class Module:
    """A source file of this package.

    Args:
        definitions: name -> the statement that defines it, and the text that documents a constant.
        imports: by the names they go by.
        works: whether importing it does more than define.
    """

    name: str
    path: Path
    text: str
    purpose: str
    definitions: dict[str, tuple[ast.stmt, ast.stmt | None]]
    imports: dict[str, Import]
    works: bool


@functools.cache
def _read(name: str) -> Module:
    path = Path(kallm_bench.__file__).parent.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    definitions: dict[str, tuple[ast.stmt, ast.stmt | None]] = {}
    imports: dict[str, Import] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        comment = after if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        for defined in _defined_by(node):
            assert defined not in definitions, f"{name}: {defined} is defined twice"
            definitions[defined] = (node, comment if isinstance(node, ast.Assign | ast.AnnAssign) else None)
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            known_as = alias.asname or alias.name
            taken = (node.module or "", alias.name) if isinstance(node, ast.ImportFrom) else (alias.name, "")
            imports[known_as] = (*taken, known_as)
    purpose = (ast.get_docstring(tree) or "").split("\n\n")[0]
    works = any(
        not _defined_by(node) and not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr) for node in tree.body
    )
    return Module(name, path, text, purpose, definitions, imports, works)


def _defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    return min([node.lineno, *(each.lineno for each in decorators)])


def _methods_without(node: ast.stmt, mentioned: set[str]) -> Iterator[ast.stmt]:
    """The methods of a class that nothing calls."""
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(part, ast.FunctionDef):
            special = part.name.startswith("__") and part.name.endswith("__")
            if part.name in LEFT_OUT or not (special or part.name in mentioned):
                yield part


def _calls_left_out(node: ast.stmt) -> Iterator[ast.stmt]:
    for part in ast.walk(node):
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            called = part.value.func
            if isinstance(called, ast.Attribute) and called.attr in LEFT_OUT:
                yield part


@functools.cache
def _attributes(text: str) -> set[str]:
    """The names after a dot that a piece of source reads."""
    nodes = ast.walk(ast.parse(text))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@functools.cache
def _names_used(text: str) -> set[str]:
    """The names that a piece of source takes from its module, by Python's own rules of scope."""
    names, ahead = set(), [(symtable.symtable(text, "<definition>", "exec"), True)]
    while ahead:
        table, outermost = ahead.pop()
        names |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (outermost or s.is_global())}
        ahead.extend((inner, False) for inner in table.get_children())
    return names


@functools.cache
def _without_marks(text: str) -> str:
    """Source without the remarks that are meant for a type checker or a linter."""
    cleaned = re.sub(r"[ \t]+# (type: ignore|noqa)\b.*$", "", text, flags=re.MULTILINE)
    assert ast.dump(ast.parse(cleaned)) == ast.dump(ast.parse(text)), "a string of ours looks like a remark"
    return cleaned


def _assembled(kept: dict[Key, Definition]) -> str:
    """The file: header, imports, then module by module, each after those it needs."""
    imports = _import_lines({each for definition in kept.values() for each in definition.imports})
    parts = [HEADER.format(version=_version()), "from __future__ import annotations\n", *imports]
    text = "\n".join(parts).rstrip()
    for module in _in_order(kept):
        source = _read(module)
        shown = source.path.relative_to(Path(kallm_bench.__file__).parent.parent).as_posix()
        purpose = [f"# {line}".rstrip() for line in source.purpose.splitlines()]
        text += "\n\n\n" + "\n".join([f"# {f' {shown} ':-^116}", *purpose])
        own = {definition.line: definition.text for key, definition in kept.items() if key[0] == module}
        before = "#"
        for line in sorted(own):
            text += (
                "\n\n\n" if any(re.match(r"(class|def|@)", each) for each in (before, own[line])) else "\n\n"
            ) + own[line]
            before = own[line]
    return text + "\n"


def _version() -> str:
    try:
        return version("kallm-bench")
    except PackageNotFoundError:  # used from a folder on the path
        return "(not installed)"


def _in_order(kept: dict[Key, Definition]) -> list[str]:
    """The modules of the kept definitions, each after those it uses."""
    order: list[str] = []

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"{module} and {above[-1]} use each other"
        if module not in order:
            used = {name for key, definition in kept.items() if key[0] == module for name, _ in definition.ours}
            for name in sorted(used - {module}):
                visit(name, (*above, module))
            order.append(module)

    for module in sorted({module for module, _ in kept}):
        visit(module, ())
    return order


def _import_lines(imports: set[Import]) -> list[str]:
    """`import` statements, the standard library's first."""
    sections = []
    for standard in (True, False):
        own = sorted(each for each in imports if (each[0].split(".")[0] in sys.stdlib_module_names) == standard)
        modules = [f"import {_as(module, known_as)}" for module, name, known_as in own if not name]
        names: dict[str, list[str]] = {}
        for module, name, known_as in own:
            if name:
                names.setdefault(module, []).append(_as(name, known_as))
        sections.append("\n".join(modules + [f"from {module} import {', '.join(names[module])}" for module in names]))
    return [f"{section}\n" for section in sections if section]


def _as(name: str, known_as: str) -> str:
    return name if name == known_as else f"{name} as {known_as}"


def _check(text: str) -> None:
    """What must hold of the file, or this package has changed in a way that cannot be cut out."""
    tree = ast.parse(text)
    names = [name for node in tree.body for name in _defined_by(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(module.split(".")[0] in INSTALLED for module in modules), f"the modelling file imports {modules}"
            assert node in tree.body, f"line {node.lineno} of the modelling file imports inside a function"
            if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            assert node.attr not in LEFT_OUT, f"line {node.lineno} of the modelling file needs {node.attr}"
    twice = {name for name in names if names.count(name) > 1 or hasattr(builtins, name)}
    assert not twice, f"more than one module defines {sorted(twice)}; give them names of their own"
