"""Layers alone: what is asked for, who may compete, what is recorded, and what the report makes of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from torch import Tensor, nn

from kallm_bench import suites
from kallm_bench.errors import DeviceError, KallmError, SuiteError
from kallm_bench.kan.kernels import plans
from kallm_bench.profiling import KernelProblem, KernelSettings, contenders, measure_kernels, problems_by_hand, tuning
from kallm_bench.profiling.replays import Timer, sample_in_turn, saved_bytes
from kallm_bench.records import Metric, ResultsStore, RunRecord
from kallm_bench.reporting import build_tables, to_csv, to_json, to_markdown
from kallm_bench.suites import find_suite, read_suite

CPU = torch.device("cpu")

SUITE = """
description = "Layers of a few channels."
[[kernels]]
shapes = [[6, 5]]
bases = ["cheby2:degree=2", "bspline:grid=3"]
tokens = 7
repeats = 2
contenders = ["kallm", "reference", "linear", "limit", "inkan"]
[[kernels]]
activations = [[7, 8]]
bases = ["rational"]
repeats = 2
contenders = ["kallm", "gelu", "limit"]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a suite; no package of others is installed, and nothing is compiled."""
    (tmp_path / "small.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    for module in ("inkan", "flashkan", "kan"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    return tmp_path


def problem(*names: str, basis: str = "cheby2:degree=2", shape: tuple[int, int | None] = (6, 5)) -> KernelProblem:
    return KernelProblem(7, *shape, basis, names, 2)


def figures(asked: KernelProblem, dtype: torch.dtype = torch.float32) -> dict[str, Metric]:
    return {metric.name: metric for metric in measure_kernels(asked, CPU, dtype)}


# --- from a suite to its report ---------------------------------------------------------------------------------------


def test_a_suite_of_kernels_from_its_first_run_to_its_report(home: Path, kallm: Run) -> None:
    code, out, err = kallm("run", "small.toml")
    assert code == 0, err
    store = ResultsStore("results")
    first = store.records(suite="small")
    arms = ["6-5-cheby2-degree2-7", "6-5-bspline-grid3-7", "8-rational-7"]
    assert [(record.arm, record.stage) for record in first] == [(arm, "kernels") for arm in arms]
    layer, _, activation = first
    names = {metric.name for metric in layer.metrics}
    timings = ("forward_seconds", "forward_backward_seconds")
    assert {f"{timing}/{name}" for timing in timings for name in layer.settings["contenders"]} <= names
    assert {"saved_bytes/linear", "relative_error/kallm", "relative_error/reference"} <= names
    assert not {"relative_error/linear", "saved_bytes/limit"} & names
    assert layer.settings["basis"] == "cheby2:degree=2"
    assert layer.settings["versions"]["torch"] == torch.__version__
    assert activation.settings["out_features"] is None
    assert (activation.value("forward_seconds/gelu") or 0) > 0
    assert "7 × 6 → 5, cheby2:degree=2" in out

    folder = next(Path("results").glob("local-*/small"))
    markdown = (folder / "report.md").read_text()
    for said in (
        "| 7 × 6 → 5, cheby2:degree=2 | kallm |",
        "|  | inkan | – | – | – |",
        "| 7 × 8, rational | kallm |",
        "Not timed, inkan: not installed: pip install --no-deps inkan==0.5.2. At 7 × 6 → 5, cheby2",
        "three products",
        "device copy",
        "median of 2 samples",
        "Computed on cpu in float32",
        "`kallm profile --kernels --suite small.toml`",
    ):
        assert said in markdown
    assert "Published" not in markdown

    # again: nothing is measured; the report is the same
    assert kallm("run", "small.toml")[:2] == (0, out)
    assert len(store.records()) == 3
    # unless it is asked for
    code, out, err = kallm("profile", "--kernels", "--suite", "small.toml", "--repeats", "3", "--json")
    assert code == 0, err
    assert [max(metric["n"] for metric in record["metrics"]) for record in json.loads(out)] == [3, 3, 3]
    assert [record.arm for record in store.records(suite="small")] == arms * 2
    assert kallm("profile", "--kernels", "--suite", "small.toml")[0] == 0
    assert len(store.records(suite="small")) == 9
    assert len(build_tables(store)[0].rows) == 13  # the newest of each


def test_one_problem_can_be_chosen_and_all_are_listed(home: Path, kallm: Run) -> None:
    code, out, _ = kallm("run", "small.toml", "--dry-run", "--json")
    assert code == 0
    assert [cell["arm"] for cell in json.loads(out)] == ["6-5-cheby2-degree2-7", "6-5-bspline-grid3-7", "8-rational-7"]
    assert kallm("run", "small.toml", "--only", "8-rational-7")[0] == 0
    assert [record.arm for record in ResultsStore("results").records()] == ["8-rational-7"]
    code, _, err = kallm("run", "small.toml", "--only", "9-rational-7")
    assert (code, "Did you mean '8-rational-7'" in err) == (1, True)


def test_kernels_by_hand(home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "SMALL_TOKENS", 3)
    words = ("--shape", "6x5", "--shape", "8", "--basis", "legendre:degree=1", "--repeats", "2")
    code, out, err = kallm("profile", "--kernels", *words)
    assert code == 0, err
    assert "On a CPU" in err
    assert "3 × 6 → 5, legendre:degree=1" in out
    assert "3 × 8, legendre:degree=1" in out
    again = "kallm profile --kernels --shape 6x5 --shape 8 --basis legendre:degree=1 --tokens 3"
    assert f"`{again}`" in out
    assert [record.suite for record in ResultsStore("results").records()] == ["manual", "manual"]
    code, _, err = kallm(*again.split()[1:], "--repeats", "2")
    assert (code, "On a CPU" in err) == (0, False)
    rows = list(csv.DictReader(kallm("report", "--format", "csv")[1].splitlines()))
    assert {row["what"] for row in rows} == {*contenders.LAYERS, *contenders.ACTIVATIONS}
    assert json.loads(kallm("report", "--format", "json")[1])["tables"][0]["table"] == "kernels"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--kernels base", 2, "CKPT goes without --kernels"),
        ("--kernels --batch 3", 2, "--batch goes without --kernels"),
        ("--shape 6x5", 2, "--shape goes with --kernels"),
        ("--kernels --suite small.toml --tokens 4", 2, "a suite has its own"),
        ("--kernels --shape 6by5", 1, "write 576x384"),
        ("--kernels --shape 6x5 --basis chebby2", 1, "Did you mean 'cheby2'"),
        ("--kernels --suite quickstart", 1, "suite 'quickstart' has no [[kernels]]"),
        ("--kernels --suite kernel", 1, "Did you mean 'kernels'"),
        ("--kernels --shape 6 --basis rational", 1, "6 channels are not divisible by 8 groups"),
    ],
)
def test_what_cannot_be_is_refused_in_words(home: Path, kallm: Run, words: str, code: int, says: str) -> None:
    left, out, err = kallm("profile", *words.split())
    assert (left, out) == (code, "")
    assert says in re.sub(r"[│\s]+", " ", err)
    assert "Traceback" not in err
    assert ResultsStore("results").records() == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "nothing would be measured"),
        ({"shapes": ((6, 5),), "tokens": 0}, "tokens must be at least 1"),
        ({"shapes": ((6, 5),), "repeats": 1}, "repeats must be at least 2"),
        ({"shapes": ((6, 5, 4),)}, r"shapes are pairs \[in, out\]"),
        ({"shapes": (6, 5)}, r"shapes are pairs"),
        ({"activations": ((7, 0),)}, r"activations are pairs \[tokens, features\]"),
        ({"shapes": ((6, 5),), "contenders": ("gelu",)}, "no contender 'gelu'"),
        ({"activations": ((7, 8),), "contenders": ("kalm",)}, "Did you mean 'kallm'"),
        ({"shapes": ((6, 5),), "bases": ()}, "at least one"),
        ({"shapes": ((6, 5),), "bases": (3,)}, "should be names"),
        ({"shapes": ((6, 5),), "bases": ("cheby2:degre=2",)}, "no argument 'degre'"),
    ],
)
def test_settings_that_measure_nothing_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(KallmError, match=says) as error:
        KernelSettings(**wrong)
    assert "\n" not in str(error.value)


def test_what_is_measured_where_nothing_is_said() -> None:
    shapes = {(each.in_features, each.out_features, each.basis) for each in problems_by_hand([], [], 64)}
    assert shapes == {
        (576, 384, "cheby2:degree=2"),
        (384, 576, "cheby2:degree=2"),
        (1536, None, "rational"),
    }
    assert [each.out_features for each in problems_by_hand([], ["rational"], 64)] == [None]
    assert [each.out_features for each in problems_by_hand([], ["rbf"], 64)] == [384, 576]
    on_cpu = suites.choose_kernels(None, [], [], None, None, on_cpu=True)
    assert ({each.tokens for each in on_cpu.problems}, on_cpu.suite) == ({1024}, "manual")
    on_gpu = suites.choose_kernels(None, [], [], None, None, on_cpu=False)
    assert (on_gpu.suite, on_gpu.note) == ("kernels", "")
    with pytest.raises(SuiteError, match="no suite"):
        suites.choose_kernels("kernelz.toml", [], [], None, None, on_cpu=True)


def test_the_shipped_suite_has_every_shape_at_both_degrees_and_every_family() -> None:
    problems = read_suite(find_suite("kernels")).kernels
    at = {(each.in_features, each.out_features, each.basis) for each in problems if each.tokens == 16_384}
    for shape in ((576, 384), (384, 576), (576, 1536), (2048, 2048), (4096, 4096)):
        assert {(*shape, "cheby2:degree=2"), (*shape, "cheby2:degree=4")} <= at
    for basis in ("legendre:degree=2", "bspline:grid=5", "bspline:grid=20", "bspline:grid=50", "rbf:centers=8"):
        assert (576, 384, basis) in at
    functions = {(each.tokens, each.in_features, each.basis) for each in problems if each.out_features is None}
    rational = {(tokens, 1536, basis) for tokens in (16_384, 65_536) for basis in ("rational", "rational-abs")}
    assert functions == rational | {(16_384, 1536, f"bspline:grid={grid}") for grid in (5, 20, 50)}
    assert all({"kallm", "limit"} <= set(each.contenders) for each in problems)
    assert {"inkan", "flashkan", "pykan"} <= {name for each in problems for name in each.contenders}


# --- who may compete --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["bspline:grid=5", "rbf"])
def test_a_sparse_product_computes_the_same(basis: str) -> None:
    found = figures(problem("sparse", "kallm", basis=basis), torch.float32)
    assert found["relative_error/sparse"].value is not None
    assert found["relative_error/sparse"].note == ""


def test_a_sparse_product_needs_a_local_family() -> None:
    found = figures(problem("sparse", "kallm", basis="cheby2"), torch.float32)
    assert found["forward_seconds/sparse"].note == "every function of this family counts everywhere"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("basis", ["cheby2:degree=4", "jacobi:a=1,b=0.5", "bspline:grid=5", "rbf:centers=4"])
def test_what_is_right_is_timed(basis: str, dtype: torch.dtype) -> None:
    found = figures(problem("kallm", "reference", basis=basis), dtype)
    for name in ("kallm", "reference"):
        assert len(found[f"forward_backward_seconds/{name}"].samples) == 2, found
        assert 0 <= (found[f"relative_error/{name}"].value or 0) < 0.05


def wrong_output(y: Tensor, x: Tensor) -> Tensor:
    return 1.01 * y


def wrong_gradient(y: Tensor, x: Tensor) -> Tensor:
    return y + (x - x.detach()).sum(-1, keepdim=True)  # the same output, another slope


def not_a_number(y: Tensor, x: Tensor) -> Tensor:
    return y * float("nan")


@pytest.mark.parametrize(
    ("harm", "what"), [(wrong_output, "y"), (wrong_gradient, "dx"), (not_a_number, "y")], ids=["y", "dx", "nan"]
)
@pytest.mark.parametrize("shape", [(6, 5), (8, None)], ids=str)
def test_what_is_wrong_is_caught_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[[Tensor, Tensor], Tensor], what: str, shape: Any
) -> None:
    true = contenders.apply

    def harmed(layer: Any, x: Tensor, backend: str) -> Tensor:
        y = true(layer, x, backend)
        return harm(y, x) if backend == "auto" else y

    monkeypatch.setattr(contenders, "apply", harmed)
    found = figures(problem("kallm", "reference", basis="legendre", shape=shape))
    assert found["forward_seconds/kallm"].value is None
    assert found["forward_seconds/kallm"].note.startswith(f"wrong, so not timed: {what} is off by ")
    assert "relative_error/kallm" in found
    assert (found["forward_seconds/reference"].value or 0) > 0


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("Tried to allocate 90 GiB"), "out of memory"),
        (RuntimeError("no kernel for\nthis"), "RuntimeError: no kernel for"),
        (contenders.NotPossibleError("too old"), "too old"),
    ],
    ids=str,
)
def test_one_that_fails_is_a_row_and_stops_nobody(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def fail(setup: contenders.Setup) -> contenders.Contender:
        raise error

    monkeypatch.setitem(contenders.LAYERS, "inkan", fail)
    found = figures(problem("inkan", "linear"))
    assert (found["forward_seconds/inkan"].value, found["forward_seconds/inkan"].note) == (None, says)
    assert (found["forward_seconds/linear"].value or 0) > 0


class TheirLayer(nn.Module):
    """As inkan's and flashkan's are called."""

    def __init__(self, in_features: int, out_features: int, grid_size: int = 5) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class PykanLayer(nn.Module):
    """As pykan's is called."""

    def __init__(self, in_dim: int = 3, out_dim: int = 2, num: int = 5, device: Any = "cpu") -> None:
        super().__init__()
        self.coef = nn.Parameter(torch.zeros(out_dim, in_dim, device=device))
        self.grid = nn.Parameter(torch.zeros(num), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert x.dtype == torch.float32
        y = nn.functional.linear(x, self.coef)
        return y, x, y, y


def test_packages_compete_with_layers_of_their_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(*sizes: int, **rest: int) -> TheirLayer:
        made.append((*sizes, rest))
        return TheirLayer(*sizes, **rest)

    for name, layer in (("inkan", make), ("flashkan", make), ("kan.KANLayer", PykanLayer)):
        module = types.ModuleType(name)
        module.KANLayer = layer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "kan", types.ModuleType("kan"))
    found = figures(problem("inkan", "flashkan", "pykan", basis="bspline:grid=9"), torch.bfloat16)
    for name in ("inkan", "flashkan", "pykan"):
        assert (found[f"forward_backward_seconds/{name}"].value or 0) > 0, found
        assert f"relative_error/{name}" not in found
    assert made == [(6, 5, {"grid_size": 9})] * 2
    monkeypatch.setitem(contenders.PYKAN_VALUES, "cpu", 100)
    assert "fewer tokens" in figures(problem("pykan"))["forward_seconds/pykan"].note
    assert "cubic" in figures(problem("inkan", basis="bspline:order=2"))["forward_seconds/inkan"].note


def test_a_package_that_lacks_another_says_which(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "halfkan.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(home)
    monkeypatch.setitem(contenders.PACKAGES, "inkan", contenders.Package("halfkan", "1"))
    note = figures(problem("inkan"))["forward_seconds/inkan"].note
    assert note == "it needs not_there_at_all, which is not installed"


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(contenders.PACKAGES))
@pytest.mark.filterwarnings("default")
def test_packages_as_they_are(name: str) -> None:
    pytest.importorskip(contenders.PACKAGES[name].module)
    found = figures(problem(name, basis="bspline:grid=5"))
    assert found[f"forward_backward_seconds/{name}"].note.startswith(("", "spread"))
    assert (found[f"forward_backward_seconds/{name}"].value or 0) > 0


# --- how it is measured -----------------------------------------------------------------------------------------------


def test_samples_are_taken_in_turn_and_the_first_rounds_do_not_count() -> None:
    order = []

    def timer(name: str) -> Timer:
        def sample() -> float:
            order.append(name)
            return float(len(order))

        return Timer(sample)

    samples = sample_in_turn({"a": timer("a"), "b": timer("b")}, repeats=2)
    assert order == ["a", "b"] * 5
    assert samples == {"a": [7.0, 9.0], "b": [8.0, 10.0]}


def test_saved_is_what_backward_needs_beyond_input_parameters_and_output() -> None:
    x = torch.randn(7, 6, requires_grad=True)
    layer = nn.Linear(6, 5)
    assert saved_bytes(lambda: layer(x), (x, *layer.parameters()), CPU) == 0
    assert saved_bytes(lambda: torch.tanh(x), (x,), CPU) == 0
    assert saved_bytes(lambda: x.sin() * x.cos(), (x,), CPU) == 2 * 7 * 6 * 4


def test_the_limit_is_three_products_on_the_features_of_the_layer() -> None:
    setup = contenders.draw("cheby2:degree=2", 7, 6, 5, CPU, torch.float64)
    y, features, weights = contenders.LAYERS["limit"](setup).both(0)
    whole, dx, dc, db = contenders.plain_layer(setup).both(0)
    torch.testing.assert_close(y + setup.layer.bias, whole)
    torch.testing.assert_close(weights, dc.flatten(1))
    assert features.shape == (7, 12)
    assert (dx.shape, db.shape) == ((7, 6), (5,))
    copies = contenders.ACTIVATIONS["limit"](contenders.draw("rational", 7, 8, None, CPU, torch.float64)).both(0)
    assert [each.numel() for each in copies] == [56, 84]


# --- the report -------------------------------------------------------------------------------------------------------


def made(store: ResultsStore, number: int, metrics: list[Metric], **settings: Any) -> None:
    asked = problem("kallm", "linear", "limit", "inkan")
    record = RunRecord(
        id=f"k{number}",
        stage="kernels",
        suite="kernels",
        arm=asked.arm,
        seed=0,
        testbed=store.testbed({"cpu": "a processor", "cores": 2, "memory_gib": 24, "gpus": [{"name": "H100"}]}),
        started=f"2026-01-01T00:00:0{number}+00:00",
        seconds=1.0,
        parents=(),
        settings={**asked.settings(), "device": "cuda", "dtype": "bfloat16", **settings},
        key=f"key{number}",
        model={},
        data={},
        metrics=tuple(metrics),
        environment={"gpu": {"driver": "580.1"}, "suite_file": "kernels"},
    )
    store.write(record)


def timing(name: str, *microseconds: float, note: str = "") -> Metric:
    seconds = [each / 1e6 for each in microseconds]
    return Metric(name, sorted(seconds)[len(seconds) // 2], n=len(seconds), samples=seconds, note=note)


MEASURED = [
    Metric("relative_error/kallm", 2.1e-3),
    Metric("saved_bytes/kallm", 0),
    Metric("peak_bytes/kallm", 31.5 * 2**20),
    timing("forward_seconds/kallm", 60.0, 60.6, 60.0),
    timing("forward_backward_seconds/kallm", 206.0, 206.0, 206.0, note="timed without a CUDA graph (no)"),
    timing("forward_seconds/linear", 20.0, 20.0, 20.0),
    timing("forward_backward_seconds/linear", 80.0, 100.0, 90.0, note="spread 22%"),
    timing("forward_seconds/limit", 30.0, 30.0, 30.0),
    timing("forward_backward_seconds/limit", 103.0, 103.0, 103.0),
    Metric("forward_seconds/inkan", None, n=0, note="not installed: pip; or not"),
    Metric("forward_backward_seconds/inkan", None, n=0, note="not installed: pip; or not"),
]


def test_ratios_are_to_the_limit_of_the_same_record(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    made(store, 1, MEASURED)
    (table,) = build_tables(store)
    rows = {row.what: {name: figure.value for name, figure in row.figures.items()} for row in table.rows}
    assert rows["kallm"]["forward_to_limit"] == pytest.approx(2.0)
    assert rows["kallm"]["forward_backward_to_limit"] == pytest.approx(2.0)
    assert rows["kallm"]["timing_spread"] == pytest.approx(0.01)
    assert rows["linear"]["forward_to_limit"] == pytest.approx(2 / 3)
    assert rows["linear"]["timing_spread"] == pytest.approx(2 / 9)
    assert rows["limit"]["forward_to_limit"] == rows["limit"]["forward_backward_to_limit"] == 1.0
    assert rows["inkan"] == {}
    markdown = to_markdown([table])
    for line in (
        "## kernels on local-",
        "| 7 × 6 → 5, cheby2:degree=2 | kallm | 60.0 | 2.00 | 206 | 2.00 | 1.0 % | 0 | 32 | 2.1e-03 |",
        "|  | linear | 20.0 | 0.67 | 90.0 | 0.87 | 22.2 % ~ | – | – | – |",
        "|  | limit | 30.0 | 1.00 | 103 | 1.00 | 0.0 % | – | – | – |",
        "|  | inkan | – | – | – | – | – | – | – | – |",
        "- ~ Spread above 3 %",
        "- Not timed, inkan: not installed: pip; or not.",
        "- With reservations, kallm: timed without a CUDA graph (no).",
        "a processor, 2 cores, 24 GiB, H100. Computed on cuda in bfloat16.",
        "driver 580.1",
        "`kallm profile --kernels --suite kernels`",
    ):
        assert line in markdown
    assert "spread 22%" not in markdown
    kallm = next(row for row in csv.DictReader(io.StringIO(to_csv([table]))) if row["what"] == "kallm")
    assert float(kallm["forward_seconds (s)"]) == pytest.approx(60e-6)
    assert float(kallm["forward_to_limit (times)"]) == pytest.approx(2.0)
    (data,) = json.loads(to_json([table]))["tables"]
    assert [row["what"] for row in data["rows"]] == ["kallm", "linear", "limit", "inkan"]
    peak = data["rows"][0]["figures"]["peak_bytes"]
    assert (peak["value"], peak["unit"], peak["interval"]) == (31.5 * 2**20, "bytes", None)


def test_the_newest_counts_and_another_dtype_stands_apart(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    made(store, 1, [timing("forward_seconds/kallm", 9.0, 9.0)])
    made(store, 2, [timing("forward_seconds/kallm", 8.0, 8.0)])
    made(store, 3, [timing("forward_seconds/kallm", 7.0, 7.0)], dtype="float32")
    (table,) = build_tables(store)
    assert [(row.name.rpartition(", ")[2], row.figures["forward_seconds"].value) for row in table.rows] == [
        ("bfloat16 on cuda", 8e-6),
        ("float32 on cuda", 7e-6),
    ]
    assert "forward_to_limit" not in table.metrics  # nobody measured it
    assert list(table.metrics) == ["forward_seconds", "timing_spread"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(64, 48), (64, None)], ids=str)
def test_on_a_gpu_graphs_are_replayed_and_memory_is_known(shape: Any) -> None:
    basis = "cheby2:degree=2" if shape[1] else "rational"
    known = contenders.LAYERS if shape[1] else contenders.ACTIVATIONS
    names = tuple(name for name in known if name not in ("sparse", *contenders.PACKAGES))  # which not all can have
    asked = dataclasses.replace(problem(*names, basis=basis, shape=shape), tokens=512)
    metrics = {metric.name: metric for metric in measure_kernels(asked, torch.device("cuda"), torch.bfloat16)}
    for name in names:
        for timing in ("forward_seconds", "forward_backward_seconds"):
            assert (metrics[f"{timing}/{name}"].value or 0) > 0, metrics[f"{timing}/{name}"]
            assert "without a CUDA graph" not in metrics[f"{timing}/{name}"].note
    assert metrics[f"saved_bytes/{'linear' if shape[1] else 'gelu'}"].value == 0
    assert (metrics["peak_bytes/reference"].value or 0) > 512 * 64 * 2


# --- plans ------------------------------------------------------------------------------------------------------------


def test_tuning_times_the_products_beside_their_limits() -> None:
    shapes = {"forward": (64, 16), "input_gradient": (64, 24), "coefficient_gradient": (16, 2, 24)}
    for kind, functions in (("polynomial", 2), ("bspline", 5), ("rbf", 2)):
        problem = plans.Problem(64, 24, 16, functions, kind)
        shapes["coefficient_gradient"] = (16, functions, 24)
        for operation, (step, limit) in tuning._steps(problem, torch.device("cpu"), torch.float32).items():
            assert step("library-16", 5).shape == shapes[operation]
            assert limit(5).ndim == 2
    assert tuning.fastest({"limit": 1.0, "a": 2.01, "b": 2.0, "c": 3.0}) == "a"  # as good as b, and before it
    with pytest.raises(DeviceError, match="on an NVIDIA GPU"):
        tuning.tune(plans.Problem(64, 24, 16, 2), torch.device("cpu"), torch.float32, 2)
    with pytest.raises(DeviceError, match="nothing to tune"):
        tuning.sizes_of(problems_by_hand(["576x384"], ["fourier", "bspline:order=1"], 64))
    of_many = tuning.sizes_of(problems_by_hand(["576x384"], ["rbf", "bspline:grid=20"], 64))
    assert of_many == [plans.Problem(64, 576, 384, 8, "rbf"), plans.Problem(64, 576, 384, 23, "bspline")]
    assert tuning.sizes_of(problems_by_hand([], [], 64))[0] == plans.Problem(64, 576, 384, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("kind", "functions"), [("polynomial", 2), ("bspline", 8), ("rbf", 5)])
def test_what_tuning_finds_is_taken(kind: str, functions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path))
    size, device = plans.Problem(512, 64, 72, functions, kind), torch.device("cuda")
    measured = tuning.tune(size, device, torch.bfloat16, 2)
    for operation, seconds in measured.items():
        assert {"limit", "library-16"} <= set(seconds)
        chosen = plans.choose(operation, size, device, plans.kinds_for(kind))
        assert chosen == plans.PLANS[operation][tuning.fastest(seconds)]
