"""What the repository shows of its results: tables and pictures in its pages, a report beside each suite's records.

`python tests/readme_tables.py` brings all of it up to date with `results/`; test_readme.py fails where that was
forgotten. In a page a block begins with a comment such as `<!-- kallm report: osre25 on h100, arms, notes -->`: suite,
testbed, the table's kind, and what else applies, in this order: `against ARM`, what the others are set beside; `only
METRIC METRIC`, the columns to show; `notes`, where those below the table are shown too. It ends with
`<!-- /kallm report -->`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from kallm_bench.records import ResultsStore
from kallm_bench.reporting import Table, build_tables, to_csv, to_markdown
from kallm_bench.reporting.plots import Drawing, drawings_of, rendered
from kallm_bench.reporting.text import markdown_table
from kallm_bench.suite_files import arm_order

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
RESULTS = ROOT / "results"

BLOCK = re.compile(
    r"(?P<begin><!-- kallm report: (?P<suite>\S+) on (?P<testbed>\S+), (?P<kind>\w+)"
    r"(, against (?P<reference>\S+))?(, only (?P<only>[\w/ ]+))?(?P<notes>, notes)? -->\n)"
    r".*?(?P<end><!-- /kallm report -->)",
    re.DOTALL,
)
PICTURE = re.compile(r"!\[[^\]]*\]\((?:\.\./)?results/(?P<testbed>[^/)]+)/(?P<suite>[^/)]+)/(?P<file>[^)]+)\.svg\)")


@cache
def tables_of(suite: str, testbed: str, reference: str | None = None) -> list[Table]:
    return build_tables(ResultsStore(RESULTS), suite, testbed, reference=reference, order=arm_order)


def with_tables(text: str) -> str:
    """A page with every block as `kallm report` has it now."""
    return BLOCK.sub(_block, text)


def _block(found: re.Match[str]) -> str:
    tables = tables_of(found["suite"], found["testbed"], found["reference"])
    (table,) = [table for table in tables if table.kind == found["kind"]]
    if found["only"]:
        headings = dict(zip(table.metrics, table.headings, strict=True))
        metrics = tuple(found["only"].split())
        table = replace(table, metrics=metrics, headings=tuple(headings[metric] for metric in metrics))
    return f"{found['begin']}{markdown_table(table, bool(found['notes']))}{found['end']}"


def pictures(text: str) -> dict[Path, Drawing | None]:
    """The pictures that a page shows, each with the drawing that it should be; None where there is no such one."""
    found = {}
    for match in PICTURE.finditer(text):
        drawings = [each for table in tables_of(match["suite"], match["testbed"]) for each in drawings_of(table)]
        path = RESULTS / match["testbed"] / match["suite"] / f"{match['file']}.svg"
        found[path] = next((drawing for drawing in drawings if drawing.name == match["file"]), None)
    return found


def reports() -> dict[Path, str]:
    """The reports beside the records of committed testbeds, as they should be."""
    found = {}
    for path in sorted(RESULTS.glob("*/*/report.md")):
        suite, testbed = path.parent.name, path.parent.parent.name
        if not testbed.startswith("local-"):
            found[path] = to_markdown(tables_of(suite, testbed))
            found[path.with_suffix(".csv")] = to_csv(tables_of(suite, testbed))
    return found


def main() -> None:
    for page in PAGES:
        text = with_tables(page.read_text(encoding="utf-8"))
        page.write_text(text, encoding="utf-8")
        for path, drawing in pictures(text).items():
            if drawing is not None:
                path.write_bytes(rendered(drawing, "svg"))
    for path, report in reports().items():
        path.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
