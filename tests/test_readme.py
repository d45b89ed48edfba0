"""What the repository shows is what its records say."""

from __future__ import annotations

from pathlib import Path

import pytest
from readme_tables import BLOCK, README, pictures, reports, with_tables

AGAIN = "run: python tests/readme_tables.py"

TEXT = README.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_records() -> None:
    assert len(BLOCK.findall(TEXT)) == TEXT.count("<!-- kallm report:") >= 5
    assert with_tables(TEXT) == TEXT, AGAIN


def test_every_table_of_results_is_from_a_report() -> None:
    """One with an interval in it that stands outside of all blocks would be typed by hand."""
    outside = BLOCK.sub("", TEXT)
    assert not [line for line in outside.splitlines() if line.startswith("| ") and ("±" in line or " % [" in line)]


@pytest.mark.parametrize("path", pictures(TEXT), ids=lambda path: path.name)
def test_the_pictures_are_of_the_records(path: Path) -> None:
    drawing = pictures(TEXT)[path]
    assert drawing is not None
    assert f"data {drawing.fingerprint}" in path.read_text(encoding="utf-8"), AGAIN


@pytest.mark.parametrize("path", reports(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_report_beside_the_records_is_of_them(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reports()[path], AGAIN
