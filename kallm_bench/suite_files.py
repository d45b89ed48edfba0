"""Where suites lie, and what their files say without being checked: for those who need no settings."""

from __future__ import annotations

import tomllib
from pathlib import Path

from kallm_bench.errors import SuiteError, unknown


def find_suite(name: str) -> Path:
    """The file of a suite: a path, or the name of one that ships with kallm. SuiteError where there is none."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for folder in _folders() for path in sorted(folder.glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    raise SuiteError(f"no suite file '{name}'" if name.endswith(".toml") else unknown("suite", name, shipped))


def arm_order(name: str) -> list[str]:
    """The arms of a suite in its file's order; none where the file is gone, or no suite's."""
    try:
        arms = tomllib.loads(find_suite(name).read_text(encoding="utf-8")).get("arm", [])
        return [str(arm["name"]) for arm in arms]
    except (SuiteError, OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, TypeError, KeyError):
        return []


def _folders() -> list[Path]:
    """Where shipped suites lie: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent
    return [package / "_suites", package.parent / "suites"]
