"""What the repository shows is what its records say."""

from __future__ import annotations

from pathlib import Path

import pytest
from readme_tables import BLOCK, PAGES, pictures, reports, with_tables

AGAIN = "run: python tests/readme_tables.py"

TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
PICTURES = {path: drawing for text in TEXTS.values() for path, drawing in pictures(text).items()}


@pytest.mark.parametrize("page", TEXTS)
def test_the_tables_are_those_of_the_records(page: str) -> None:
    text = TEXTS[page]
    assert len(BLOCK.findall(text)) == text.count("<!-- kallm report:") >= 5
    assert with_tables(text) == text, AGAIN


@pytest.mark.parametrize("page", TEXTS)
def test_every_table_of_results_is_from_a_report(page: str) -> None:
    """One with an interval in it that stands outside of all blocks would be typed by hand."""
    outside = BLOCK.sub("", TEXTS[page])
    assert not [line for line in outside.splitlines() if line.startswith("| ") and ("±" in line or " % [" in line)]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_the_pictures_are_of_the_records(path: Path) -> None:
    drawing = PICTURES[path]
    assert drawing is not None
    assert f"data {drawing.fingerprint}" in path.read_text(encoding="utf-8"), AGAIN


@pytest.mark.parametrize("path", reports(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_report_beside_the_records_is_of_them(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reports()[path], AGAIN
