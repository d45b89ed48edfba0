"""The report as a page: whole in itself, safe from what arms are called, and at work in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_reporting import Bench

from kallm_bench.records import Metric
from kallm_bench.reporting import build_tables
from kallm_bench.reporting.html import to_html

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)

IN_FRONT = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));
</script>"""

BEHIND = """<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const headings = [...table.tHead.rows[0].cells];
  const column = headings.findIndex((each) => each.textContent.trim() === "held-out loss");
  const read = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
  const press = (number) => { headings[number].querySelector("button").click(); return read(); };
  const seen = (element) => { const box = element.getBoundingClientRect(); return box.width > 200 && box.height > 100; };
  const told = {
    before: read(), descending: press(column), sort: headings[column].getAttribute("aria-sort"),
    ascending: press(column), names: press(0), sorts: document.querySelectorAll("[aria-sort]").length,
    drawings: [...document.querySelectorAll("figure svg")].map(
      (svg) => seen(svg) && svg.querySelectorAll("path").length > 10 && svg.querySelectorAll("text").length > 5),
    ink: getComputedStyle(document.querySelector("figure svg text")).fill,
    colours: [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor],
    fetched: performance.getEntriesByType("resource").length,
    sideways: document.documentElement.scrollWidth > innerWidth,
    doubled: [...document.querySelectorAll("[id]")].length - new Set([...document.querySelectorAll("[id]")].map((e) => e.id)).size,
    problems,
  };
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(told);
});
</script>"""  # noqa: E501


@pytest.fixture
def page(tmp_path: Path) -> str:
    """A report with all drawings, an arm with a nasty name, and a missing value."""
    bench = Bench(tmp_path / "results")
    bench.record("profile", "bare", 0, {"batch": 4, "device": "cpu", "dtype": "float32"}, [Metric("parameters", 5.0)])
    bench.arm("untouched", 0, None, 2.274, right=8)
    bench.arm("linear", 0, {"basis": "linear"}, 2.5, right=5, replaced=1000)
    for seed in range(2):
        bench.arm("<b>kan & co", seed, {"basis": "cheby2", "degree": 2}, 2.391 + seed / 100, right=4, replaced=1000)
    return to_html(build_tables(bench.store), [(Path("x<y.json"), "not a record")])


class Reader(HTMLParser):
    """Notes the tags that are open and what each start tag says; complains of those that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nobody(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    links = [value for _, attrs in reader.tags for name, value in attrs.items() if name.endswith(("href", "src"))]
    assert links
    assert all(link and link.startswith(("#", "data:")) for link in links), links
    assert not re.findall(r"@import|url\((?!#)", page)
    assert sum(tag == "svg" for tag, _ in reader.tags) == 3
    assert "as published, not measured here" in page.lower()


def test_what_arms_are_called_stays_text(page: str) -> None:
    assert "<b>kan" not in page
    assert "&lt;b&gt;kan &amp; co" in page
    assert "x&lt;y.json" in page


def opened(page: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the page has come to in a browser that pressed some headings."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    file = folder / "page.html"
    page = page.replace("<head>", f"<head>{IN_FRONT}", 1)
    file.write_text(page.replace("</body>", f"{BEHIND}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1366,768"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    home = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        [*command, *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, check=True, env=home
    )
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<pre>(.*)</pre>", done.stdout)
    assert found, done.stdout[-500:]
    told: dict[str, Any] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return told


def contrast(colours: list[str]) -> float:
    """WCAG's contrast ratio of two colours as a browser writes them."""
    shares = []
    for colour in colours:
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        shares.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(shares) + 0.05) / (min(shares) + 0.05)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page: str, tmp_path: Path, scheme: str) -> None:
    told = opened(page, tmp_path, f"--blink-settings=preferredColorScheme={'01'[scheme == 'light']}")
    assert told["problems"] == []
    assert told["fetched"] == 0
    assert told["doubled"] == 0
    kan, chance = "<b>kan & co", ["guessing", "majority answer"]
    assert told["before"] == ["bare", "untouched", "linear", kan, *chance]
    assert told["descending"] == ["linear", kan, "untouched", "bare", *chance]  # what has no loss stays below
    assert told["ascending"] == ["untouched", kan, "linear", "bare", *chance]
    assert told["sort"] == "descending"
    assert told["names"] == sorted(told["names"], key=lambda name: name.strip("<"))
    assert told["sorts"] == 1
    assert told["drawings"] == [True] * 3
    assert not told["sideways"], "the page is wider than a laptop"
    dark = int(re.findall(r"\d+", told["colours"][1])[0]) < 128
    assert dark == (scheme == "dark")
    assert contrast(told["colours"]) > 7
    assert told["ink"] == told["colours"][0], "drawings take the page's ink"
