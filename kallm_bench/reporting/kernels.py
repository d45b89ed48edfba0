"""What records of layers alone hold, a row a contender, and what the notes below their table say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from kallm_bench.records import WIDE_SPREAD, RunRecord
from kallm_bench.reporting.notes import place

KERNEL_COLUMNS: tuple[tuple[str, str], ...] = (
    ("forward_seconds", "forward µs"),
    ("forward_to_limit", "× limit"),
    ("forward_backward_seconds", "forward + backward µs"),
    ("forward_backward_to_limit", "× limit"),
    ("timing_spread", "spread"),
    ("saved_bytes", "saved MiB"),
    ("peak_bytes", "peak MiB"),
    ("relative_error", "error"),
)
"""Metric and heading of each column; a column without a single value is left out."""

WIDE = "~"
"""Marks a spread above WIDE_SPREAD."""

SAMPLED = {
    "cuda": "each of CUDA graphs that hold up to 10 calls, so that launches do not hide the kernels",
    "cpu": "each of up to 10 calls by the wall clock",
}
"""How a sample is taken, by device."""

AUTO = {"cuda": "bfloat16", "cpu": "float32"}
"""What `--dtype auto` is, by device."""

CONTENDERS = {
    "kallm": "what our layers call",
    "reference": "expansion, concatenation and product in plain PyTorch",
    "compiled": "that under torch.compile",
    "sparse": "of a local family the functions that are not zero, each a row of coefficients (embedding_bag, float32)",
    "linear": "nn.Linear of the same in and out",
    "gelu": "PyTorch's, in place of the learned function",
}
"""Who is timed, but for packages and the limit, which have notes of their own."""

COLUMNS = {
    "saved_bytes": "Saved: kept from forward for backward, beyond input, parameters and output.",
    "peak_bytes": "Peak: most GPU memory in forward and backward, beyond input and parameters.",
    "relative_error": "Error: against float64 on the same values, the largest of the output's and the gradients'.",
}
"""What the columns that are no times mean."""


def newest_problems(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Of records oldest first, the newest of each problem, device and dtype, in the order first measured."""
    newest: dict[tuple[str, ...], RunRecord] = {}
    for record in records:
        if record.stage == "kernels":
            newest[record.settings["device"], record.settings["dtype"], record.arm] = record
    return list(newest.values())


def problem_of(record: RunRecord, among: Sequence[RunRecord] = ()) -> str:
    """What was computed: "16,384 × 576 → 384, cheby2:degree=2"; and in what, where not all others were the same."""
    settings = record.settings
    out = f" → {settings['out_features']:,}" if settings["out_features"] else ""
    places = {(each.settings["device"], each.settings["dtype"]) for each in among}
    computed = f", {settings['dtype']} on {settings['device']}" if len(places) > 1 else ""
    return f"{settings['tokens']:,} × {settings['in_features']:,}{out}, {settings['basis']}{computed}"


def figures_of(record: RunRecord) -> dict[str, dict[str, float]]:
    """Contender -> metric -> value, with the ratios to the limit of the same record; empty for one that failed."""
    found: dict[str, dict[str, float]] = {}
    for metric in record.metrics:
        name, _, contender = metric.name.partition("/")
        figures = found.setdefault(contender, {})
        if metric.value is not None:
            figures[name] = metric.value
        if metric.samples:
            figures["timing_spread"] = max(metric.spread, figures.get("timing_spread", 0.0))
    limit = found.get("limit", {})
    for figures in found.values():
        for timing in ("forward", "forward_backward"):
            if (mine := figures.get(f"{timing}_seconds")) and (least := limit.get(f"{timing}_seconds")):
                figures[f"{timing}_to_limit"] = mine / least
    return found


def kernel_notes(suite: str, testbed: dict[str, Any], records: Sequence[RunRecord]) -> Iterable[str]:
    """The notes below the table, the most important first."""
    yield from _limits(records)
    yield from _contenders(records)
    yield from _figures(records)
    yield from _reservations(records)
    yield f"{place(testbed, records)} {_versions(records)}"
    if suite == "manual":
        yield from _commands(records)
        return
    named = max(records, key=lambda record: (record.started, record.id)).environment.get("suite_file") or suite
    again = f"kallm profile --kernels --suite {named}{_dtype(records)}"
    yield f"Run it again: `{again}`; this table: `kallm report --suite {suite}`."


def _limits(records: Sequence[RunRecord]) -> Iterable[str]:
    if any(record.settings["out_features"] for record in records):
        yield (
            "× limit, of a layer: time over that of the library's three products alone, on ready-made features F of "
            "the same inner width, in the same dtype and run: forward F·Wᵀ; forward + backward that, dY·W and dYᵀ·F."
        )
    if any(not record.settings["out_features"] for record in records):
        yield (
            "× limit, of a function per channel group: time over that of a device copy of the fewest bytes: forward "
            "reads x and writes y; backward reads x and dy and writes dx."
        )


def _contenders(records: Sequence[RunRecord]) -> Iterable[str]:
    present = {name for record in records for name in record.settings["contenders"]}
    if told := [f"{name}: {what}" for name, what in CONTENDERS.items() if name in present]:
        yield "; ".join(told) + "."
    versions = dict.fromkeys(name for record in records for name in record.settings.get("versions", {}))
    if packages := [name for name in versions if name in present]:
        yield (
            f"{', '.join(packages)}: packages from PyPI, each with B-splines of its own beside a SiLU path, on the "
            "problem's grid or 5 intervals. They compute other functions than the problem's, so no error is given. "
            "inkan and flashkan are compiled whole, in the problem's dtype; pykan runs as it is, in float32."
        )


def _figures(records: Sequence[RunRecord]) -> Iterable[str]:
    counts = " or ".join(map(str, sorted({m.n for record in records for m in record.metrics if m.samples}))) or "no"
    for device in sorted({record.settings["device"] for record in records}):
        yield (
            f"Times: median of {counts} samples, {SAMPLED.get(device, device)}; contenders take turns, and so do "
            "inputs, so that none lies in the cache. Spread: range over median of the samples, the wider of both times."
        )
    if any(metric.spread > WIDE_SPREAD for record in records for metric in record.metrics):
        yield f"{WIDE} Spread above {100 * WIDE_SPREAD:.0f} %: measure again while the machine does nothing else."
    present = {metric.name.partition("/")[0] for record in records for metric in record.metrics}
    if told := [meaning for name, meaning in COLUMNS.items() if name in present]:
        yield " ".join(told)


def _reservations(records: Sequence[RunRecord]) -> Iterable[str]:
    """Who has no figures, and why; and whose were measured in another way than the rest."""
    told: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for reason in dict.fromkeys(_reasons(record)):
            told[reason].append(problem_of(record, records))
    for reason, problems in told.items():
        yield f"{reason}" + ("." if len(problems) == len(records) else f". At {'; '.join(problems)}.")


def _reasons(record: RunRecord) -> Iterable[str]:
    """What the notes of its timings say, but for the spread, which has a column."""
    for metric in record.metrics:
        name, _, contender = metric.name.partition("/")
        if not name.endswith("_seconds") or not metric.note:
            continue
        if metric.value is None:
            yield f"Not timed, {contender}: {metric.note}"
        else:
            yield from (
                f"With reservations, {contender}: {note}"
                for note in metric.note.split("; ")
                if not note.startswith("spread ")
            )


def _versions(records: Sequence[RunRecord]) -> str:
    """Of what was compared, and of the GPU's driver."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        versions = dict(record.settings.get("versions", {})) | {
            "driver": record.environment.get("gpu", {}).get("driver")
        }
        for name, version in versions.items():
            found[name] |= {version} if version else set()
    return ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in found.items() if each) + "."


def _commands(records: Sequence[RunRecord]) -> Iterable[str]:
    """The options that ask for the same again: a line for each number of tokens and set of shapes."""
    shapes: dict[tuple[int, str], list[str]] = defaultdict(list)
    for settings in (record.settings for record in records):
        out = f"x{settings['out_features']}" if settings["out_features"] else ""
        shapes[settings["tokens"], settings["basis"]].append(f"{settings['in_features']}{out}")
    bases: dict[tuple[int, tuple[str, ...]], list[str]] = defaultdict(list)
    for (tokens, basis), of_basis in shapes.items():
        bases[tokens, tuple(dict.fromkeys(of_basis))].append(basis)
    for (tokens, of_bases), names in bases.items():
        words = [*(f"--shape {shape}" for shape in of_bases), *(f"--basis {name}" for name in names)]
        yield f"Run it again: `kallm profile --kernels {' '.join(words)} --tokens {tokens}{_dtype(records)}`."


def _dtype(records: Sequence[RunRecord]) -> str:
    """The option for a dtype that is not the one its device takes by itself."""
    chosen = {each.settings["dtype"] for each in records if each.settings["dtype"] != AUTO.get(each.settings["device"])}
    return f" --dtype {chosen.pop()}" if len(chosen) == 1 else ""
