"""What `kallm profile` measures of models, alone and side by side: figures by hand, on real small models."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from architectures import make
from conftest import Run
from transformers import DynamicCache

from kallm_bench.engine import costs
from kallm_bench.errors import DeviceError
from kallm_bench.models import KANSpec, load_weights, retrofit, save_checkpoint, sources
from kallm_bench.profiling import (
    ProfileSettings,
    Rig,
    flops_per_token,
    give_back,
    measure_inference,
    measure_parts,
    only_new_garbage,
    room,
)
from kallm_bench.profiling.flops import Limits, cache_bytes, forward_flops, step_bytes, weight_bytes
from kallm_bench.profiling.hardware import Reading
from kallm_bench.profiling.parts import parts_of
from kallm_bench.profiling.rig import Measured
from kallm_bench.profiling.settings import Point
from kallm_bench.profiling.throughput import Decode, random_tokens
from kallm_bench.profiling.training_step import measure_training, no_steps
from kallm_bench.records import Metric, ResultsStore
from kallm_bench.suites import read_suite
from kallm_bench.training import SCOPES

CPU = torch.device("cpu")
GIB = 2**30


def named(metrics: list[Metric]) -> dict[str, Metric]:
    found = {metric.name: metric for metric in metrics}
    assert len(found) == len(metrics), "a name twice"
    return found


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_a_grid_has_each_batch_with_each_length_and_the_main_point_first() -> None:
    settings = ProfileSettings(4, 64, batches=(1, 4), lengths=(128, 32))
    assert [str(point) for point in settings.points] == ["4x64", "1x32", "1x128", "4x32", "4x128"]
    assert [settings.part(point) for point in settings.points[:2]] == ["", "/1x32"]
    assert ProfileSettings(4, 64).points == (Point(4, 64),)
    assert ProfileSettings(4, 64, batches=(1, 4), lengths=(64,)).points == (Point(4, 64), Point(1, 64))


def test_a_suite_may_ask_for_a_grid_and_scopes(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(
        """
        [profile]
        batch = 8
        length = 64
        batches = [1, 8]
        lengths = [32, 64]
        scope = "all"
        scopes = ["lora"]
        [[arm]]
        name = "untouched"
        """
    )
    (cell,) = read_suite(tmp_path / "grid.toml").cells
    assert [str(point) for point in cell.profile.points] == ["8x64", "1x32", "1x64", "8x32"]
    assert cell.profile.all_scopes == ("all", "lora")


def test_the_way_that_changes_dtypes_comes_last() -> None:
    settings = ProfileSettings(scope="tail", scopes=("all", "tail", "lora"), ways=("plain", "kept", "ours"))
    assert [tuple(step) for step in settings.steps] == [
        ("ours", "tail", ""),
        ("ours", "all", "/all"),
        ("ours", "lora", "/lora"),
        ("kept", "tail", "/kept"),
        ("plain", "tail", "/plain"),
    ]
    assert ProfileSettings(scope="none", scopes=()).steps == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batches": (1, 0)}, "batch must be at least 1, got 0"),
        ({"lengths": (64, 16)}, "length must be at least 32, got 16"),
        ({"batches": (1.5,)}, r"batch must be at least 1, got 1\.5"),
        ({"new_tokens": 1}, "new_tokens must be at least 4, got 1"),
    ],
)
def test_points_that_measure_nothing_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        ProfileSettings(**wrong)


# --- prefill and decoding ---------------------------------------------------------------------------------------------


def test_prefill_and_decoding_are_measured_at_every_point(tiny_llama: Any) -> None:
    settings = ProfileSettings(2, 64, batches=(1, 2), lengths=(32, 64, 1024), new_tokens=8, repeats=2)
    (metrics,) = measure_inference([tiny_llama(vocab_size=97)], settings, Rig(CPU, repeats=2))
    found = named(metrics)
    for part, batch, length in (("", 2, 64), ("/1x32", 1, 32), ("/1x64", 1, 64), ("/2x32", 2, 32)):
        prefill, decode = (found[f"{phase}_tokens_per_second{part}"] for phase in ("prefill", "decode"))
        seconds = [found[f"{phase}_seconds{part}"].samples for phase in ("prefill", "decode")]
        assert list(prefill.samples) == [batch * length / each for each in seconds[0]]
        assert list(decode.samples) == [batch / each for each in seconds[1]]
        assert prefill.n == decode.n == 2
    for part in ("/1x1024", "/2x1024"):
        assert found[f"prefill_seconds{part}"].note == "the model takes 512 tokens"
        assert found[f"decode_seconds{part}"].value is None
    for name in ("prefill_mfu", "prefill_roofline", "decode_mfu", "decode_roofline"):
        assert found[name].note == "no data sheet is known of this device"
    assert found["decode_joules_per_token"].note == "energy is read by NVML, of an NVIDIA GPU"
    assert "decode_joules_per_token/1x32" not in found  # why there is none is said once


def test_decoding_ends_at_its_length_and_counts_what_follows_the_first_token(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(vocab_size=97)
    lengths: list[int] = []
    handle = model.register_forward_hook(
        lambda module, inputs, output: lengths.append(output.past_key_values.get_seq_length())
    )
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr("kallm_bench.profiling.throughput.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    seconds = Decode(Rig(CPU), model, random_tokens(model, Point(2, 64)), 8)()
    handle.remove()
    assert lengths == [56, *range(57, 64)]  # the prompt, then seven steps; the last token is not put through
    assert seconds == 10.0


def test_energy_of_decoding_is_without_its_prompts(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 64 tokens take 6.4 J, a run of decoding 56 tokens of prompt and seven steps of two sequences."""
    taken = iter([Measured((1.0,), joules=Reading(6.4)), Measured((1.0,), joules=Reading(5.6 + 14.0))])
    monkeypatch.setattr(Rig, "measure", lambda rig, name, works: [next(taken)])
    (metrics,) = measure_inference([tiny_llama(vocab_size=97)], ProfileSettings(2, 64, new_tokens=8), Rig(CPU))
    found = named(metrics)
    assert found["prefill_joules_per_token"].value == pytest.approx(0.05)
    assert found["decode_joules_per_token"].value == pytest.approx(1.0)


def test_with_a_data_sheet_there_are_fractions_of_it(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(vocab_size=97)
    monkeypatch.setattr("kallm_bench.profiling.throughput.limits_of", lambda device, dtype: Limits(1e9, 1e6))
    (metrics,) = measure_inference([model], ProfileSettings(2, 64, new_tokens=8), Rig(CPU, repeats=3))
    found = named(metrics)
    head = 2 * 32 * 97
    needed = 128 * (flops_per_token(model) - head) + 2 * head
    cached = 4 * 2 * 2 * 8 * 4  # blocks, keys and values, heads of 8, bytes
    assert found["prefill_mfu"].value == pytest.approx(needed / 1e9 / found["prefill_seconds"].value)
    moved = weight_bytes(model) + 128 * cached
    assert found["prefill_roofline"].value == pytest.approx(moved / 1e6 / found["prefill_seconds"].value)
    moved = weight_bytes(model) + 2 * 60 * cached  # of 56 to 64 tokens
    assert found["decode_roofline"].value == pytest.approx(moved / 1e6 / found["decode_seconds"].value)


def test_what_must_be_computed_and_moved_by_hand(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    head, weights = 2 * 32 * 97, sum(parameter.numel() for parameter in model.parameters())
    assert forward_flops(model, 10, 10) == 10 * flops_per_token(model)
    assert forward_flops(model, 10, 1) == 10 * flops_per_token(model) - 9 * head
    assert weight_bytes(model) == 4 * weights
    untied = tiny_llama(vocab_size=97, tie_word_embeddings=False)
    assert weight_bytes(untied) == 4 * weights  # the embedding is looked up, the head is read
    model.requires_grad_(False)
    assert step_bytes(model, torch.bfloat16) == 2 * weights
    model.lm_head.requires_grad_(True)
    assert step_bytes(model, torch.bfloat16) == 2 * weights + 32 * 32 * 97


def test_a_cache_is_as_large_as_predicted(tiny_llama: Any) -> None:
    model, cache = tiny_llama(vocab_size=97), DynamicCache()
    model(input_ids=torch.ones(3, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert held == 3 * 5 * cache_bytes(model.config, torch.float32)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom", "gpt_neox", "mixtral", "jamba"])
@pytest.mark.parametrize("retrofitted", [False, True], ids=["untouched", "retrofitted"])
@pytest.mark.filterwarnings("ignore")
def test_parts_make_up_the_whole(kind: str, retrofitted: bool) -> None:
    model = make(kind, 2)
    if retrofitted:
        retrofit(model, KANSpec((1,), "cheby2", hidden=8, experts=True))
    settings = ProfileSettings(1, 32, new_tokens=4, repeats=2)
    (metrics,) = measure_parts([model], settings, Rig(CPU, repeats=2))
    found = named(metrics)
    names = {name.partition("/")[2] for name in found}
    mixers = {"attention", "mixer"} if kind == "jamba" else {"attention"}
    assert names - mixers == {"feed-forward", "head", "rest"} | ({"kan"} if retrofitted else set())
    for metric, whole in (
        ("part_parameters", sum(parameter.numel() for parameter in model.parameters())),
        ("part_flops_per_token", flops_per_token(model)),
    ):
        parts = {name: each.value for name, each in found.items() if name.startswith(f"{metric}/")}
        assert sum(value or 0 for value in parts.values()) == whole
        assert parts[f"{metric}/head"] in (96 * 32, 2 * 96 * 32)
    for phase in ("prefill", "decode"):
        for name in names - {"rest"}:
            metric = found[f"{phase}_part_seconds/{name}"]
            assert (metric.value or 0) > 0
            assert metric.n == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_part_has_the_time_that_it_takes(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the feed-forwards move, 2 s a token each, and the head, 5 s."""
    model = tiny_llama(vocab_size=97)
    now = [0.0]

    def passing(seconds: float) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            now[0] += seconds * output.shape[1]

        return hook

    for block in model.model.layers:
        block.mlp.act_fn.register_forward_hook(passing(2.0))
    monkeypatch.setattr("kallm_bench.profiling.parts.time", SimpleNamespace(perf_counter=lambda: now[0]))
    model.lm_head.register_forward_hook(passing(5.0))
    (metrics,) = measure_parts([model], ProfileSettings(1, 32, new_tokens=4, repeats=2), Rig(CPU, repeats=2))
    for phase, tokens in (("prefill", 32), ("decode", 1)):
        seconds = {
            name.partition("/")[2]: metric.value
            for name, metric in named(metrics).items()
            if name.startswith(f"{phase}_part_seconds/")
        }
        assert seconds == {"attention": 0.0, "feed-forward": 8.0 * tokens, "head": 5.0, "rest": 0.0}


def test_parts_that_cannot_be_found_are_no_figure(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (metric,), (other, *_) = measure_parts(
        [make("falcon_mamba", 2), tiny_llama(vocab_size=97)],
        ProfileSettings(1, 32, new_tokens=4, repeats=2),
        Rig(CPU, repeats=2),
    )
    assert (metric.name, metric.value) == ("part_parameters", None)
    assert metric.note.startswith("parts cannot be told apart: ")
    assert other.name == "part_parameters/attention"


def test_blocks_are_told_apart_by_what_is_in_them(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("1", "rational", form="glu"))
    retrofit(model, KANSpec("2", "linear"))
    retrofit(model, KANSpec("3", "cheby2", target="linears"))
    names = [part.name for part in parts_of(model)]
    feedforwards = ["feed-forward", "kan", "feed-forward", "kan"]
    assert names == [*(name for each in feedforwards for name in ("attention", each)), "head"]


# --- training ---------------------------------------------------------------------------------------------------------


def test_every_scope_of_every_model_is_measured(tiny_llama: Any) -> None:
    models = [tiny_llama(vocab_size=97) for _ in range(2)]
    for model in models:
        retrofit(model, KANSpec("2-3", "cheby2"))
    others = tuple(scope for scope in SCOPES if scope != "tail")
    settings = ProfileSettings(1, 32, repeats=2, scope="tail", scopes=others)
    for metrics in measure_training(models, settings, Rig(CPU, repeats=2)):
        found = named(metrics)
        flops = {}
        for part in ("", *(f"/{scope}" for scope in others)):
            assert len(found[f"train_tokens_per_second{part}"].samples) == 2
            flops[part] = found[f"train_flops_per_token{part}"].value or 0
        assert flops["/replaced"] < flops[""] < flops["/tail+head"] < flops["/all"]
        assert found["train_roofline"].note == "no data sheet is known of this device"


@pytest.mark.parametrize("trial", ["predicted", "tried"])
def test_steps_that_do_not_fit_say_so(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, trial: str) -> None:
    model = tiny_llama(vocab_size=97)
    if trial == "predicted":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e5, total=GIB))
        said = "predicted not to fit: 0.0 GiB and activations, and the machine has 0.0 GiB free of 1.0 GiB"
    else:

        def full(*called: Any, **named: Any) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(torch.optim.AdamW, "step", full)
        said = "out of memory"
    settings = ProfileSettings(1, 32, repeats=2, scope="all")
    (metrics,) = measure_training([model], settings, Rig(CPU, repeats=2))
    found = named(metrics)
    assert (found["train_tokens_per_second"].value, found["train_tokens_per_second"].note) == (None, said)
    assert "peak_resident_bytes" not in found
    assert all(parameter.grad is None for parameter in model.parameters())
    assert no_steps(settings, said) == [found["train_tokens_per_second"]]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `base`, a retrofit of it, `kan`, and a model of half its depth, `short`."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "short", tiny_llama(vocab_size=97, num_hidden_layers=2))
    model = tiny_llama(vocab_size=97)
    save_checkpoint(folder / "base", model)
    retrofit(model, KANSpec("2-3", "cheby2"))
    save_checkpoint(folder / "kan", model)
    return folder


@pytest.fixture
def home(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "kan", "short"):
        (tmp_path / name).symlink_to(two / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


SMALL = ("--batch", "1", "--length", "32", "--repeats", "2")


def test_a_profile_from_the_command_to_its_record(home: Path, kallm: Run) -> None:
    words = ("--batch", "2,1", "--length", "32,64", "--repeats", "2", "--scope", ",".join(("tail", *SCOPES)))
    code, out, err = kallm("profile", "kan", *words)
    assert code == 0, err
    (record,) = ResultsStore(home / "results").records()
    found = named(list(record.metrics))
    assert (record.settings["batch"], record.settings["length"]) == (2, 64)
    for point in ("", "/1x32", "/1x64", "/2x32"):
        assert (found[f"prefill_seconds{point}"].value or 0) > 0
    for scope in SCOPES:
        assert found[f"trainable_parameters/{scope}"].value
        assert found[f"train_tokens_per_second{'' if scope == 'tail' else f'/{scope}'}"].value
    for phase in ("/load", "/prefill", "/decode", ""):
        assert (found[f"peak_resident_bytes{phase}"].value or 0) > 1e8
    assert found["load_seconds"].n == 2
    assert "profile: kan, 2 x 64" in out
    assert "· not measured: prefill_joules_per_token, " in out
    assert "kan" in out.partition("decode_part_seconds")[0]


def test_a_cpu_is_asked_for_what_it_can_do_in_minutes(home: Path, kallm: Run) -> None:
    """The grid, the usual scope's training step, parts and peaks, each of three samples."""
    code, _, err = kallm("profile", "kan")
    assert code == 0, err
    (record,) = ResultsStore(home / "results").records()
    assert (record.settings["scope"], record.settings["scopes"]) == ("tail", [])
    found = named(list(record.metrics))
    points = ("", "/1x64", "/1x256", "/4x64")
    measured = [f"{phase}_seconds{point}" for phase in ("prefill", "decode") for point in points]
    measured += [f"{phase}_part_seconds/{part}" for phase in ("prefill", "decode") for part in ("attention", "head")]
    for metric in (*measured, "train_tokens_per_second", "load_seconds"):
        assert found[metric].n == len(found[metric].samples) == 3, metric
    for phase in ("/load", "/prefill", "/decode", ""):
        assert found[f"peak_resident_bytes{phase}"].value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_loaded_that_is_not_measured(
    home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    loaded: list[torch.dtype] = []

    def counted(source: Any, given: torch.dtype, device: torch.device) -> Any:
        loaded.append(given)
        return load_weights(source, given, device)

    monkeypatch.setattr(costs, "load_weights", counted)
    monkeypatch.setattr(sources, "_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded"))
    code, _, err = kallm("profile", "kan", "--batch", "1", "--length", "32", "--repeats", "3", "--dtype", dtype)
    assert code == 0, err
    (record,) = ResultsStore(home / "results").records()
    found = named(list(record.metrics))
    assert found["load_seconds"].n == 3
    assert found["train_tokens_per_second"].n == 3
    assert loaded == [getattr(torch, dtype)] * 4  # one before those that are timed; training takes the same model
    assert gc.get_freeze_count() == 0


def test_progress_is_told_before_anything_is_done(tiny_llama: Any) -> None:
    told: list[tuple[str, int, int]] = []
    rig = Rig(CPU, repeats=2, watch=lambda work, done, total, note="": told.append((work, done, total)))
    seen: list[int] = []

    def work() -> float:
        seen.append(len(told))
        return 0.1

    rig.measure("a work", [work], runs=1)
    assert told == [("profile of a work", done, 3) for done in range(4)]
    assert seen == [1, 2, 3], "a run that nobody was told of"
    told.clear()
    model, settings = tiny_llama(vocab_size=97), ProfileSettings(1, 32, repeats=2, scope="all")
    measure_inference([model], settings, rig)
    measure_training([model], settings, rig)
    assert list(dict.fromkeys(work for work, *_ in told)) == [
        "profile of prefill 1x32",
        "profile of decode 1x32",
        "profile of peak memory at 1x32",
        "profile of training, all, ours",
    ]


def test_garbage_is_looked_for_among_what_is_new() -> None:
    class Circle:
        def __init__(self) -> None:
            self.itself = self

    old = weakref.ref(Circle())
    with only_new_garbage():
        assert old() is None
        frozen = gc.get_freeze_count()
        assert frozen > 10_000
        new = weakref.ref(Circle())
        give_back(CPU)
        assert new() is None
    assert gc.get_freeze_count() == 0


def test_memory_is_given_back_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([5, 10, 5, 10])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=next(free) * GIB, total=20 * GIB))
    given: list[torch.device] = []
    monkeypatch.setattr(room, "give_back", given.append)
    assert room.too_large(4 * GIB, CPU) == ""
    assert not given
    assert room.too_large(12 * GIB, CPU) == (
        "predicted not to fit: 12.0 GiB and activations, and the machine has 5.0 GiB free of 20.0 GiB"
    )
    assert given == [CPU]


def test_two_checkpoints_side_by_side(home: Path, kallm: Run) -> None:
    code, out, err = kallm("profile", "base", "kan", *SMALL, "--scope", "tail,all", "--json")
    assert code == 0, err
    first, second = json.loads(out)
    assert [record["arm"] for record in (first, second)] == ["base", "kan"]
    assert first["key"] != second["key"]
    assert first["settings"]["tail_from"] == second["settings"]["tail_from"] == 2
    assert first["settings"]["beside"] == second["model"]["fingerprint"]
    assert second["settings"]["beside"] == first["model"]["fingerprint"]
    mine, other = ({metric["name"]: metric for metric in record["metrics"]} for record in (second, first))
    assert not any(name.startswith("ratio") for name in other)
    for name in ("prefill_seconds", "decode_seconds", "train_tokens_per_second", "train_tokens_per_second/all"):
        ratio = mine[f"ratio/{name}"]
        samples = zip(mine[name]["samples"], other[name]["samples"], strict=True)
        assert ratio["samples"] == pytest.approx([above / below for above, below in samples])
        assert mine[f"ratio_low/{name}"]["value"] < ratio["value"] < mine[f"ratio_high/{name}"]["value"]
    assert mine["ratio/parameters"]["value"] < 1
    assert "two models are in this process" in mine["peak_resident_bytes"]["note"]


def test_a_checkpoint_beside_itself_tells_how_well_ratios_are_known(home: Path, kallm: Run) -> None:
    code, out, err = kallm("profile", "base", "base", *SMALL, "--scope", "none", "--json")
    assert code == 0, err
    first, second = json.loads(out)
    assert first["key"] != second["key"]
    assert {metric["name"]: metric["value"] for metric in second["metrics"]}["ratio/parameters"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("base", "--scope", "tail"), "scope 'tail' needs replaced blocks and this model has none"),
        (("base", "kan", "--scope", "replaced"), "scope 'replaced' needs replaced blocks"),
        (("kan", "--scope", "tale"), "no scope 'tale'. Did you mean 'tail'?"),
        (("kan", "short"), "tail_from 2: the model has 2 blocks, 0-1"),
        (("base", "--batch", "0"), "batch must be at least 1, got 0"),
        (("base", "kant"), "kant"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_any_work(
    home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(costs, "load_weights", lambda *arguments: pytest.fail("a model was loaded"))
    code, _, err = kallm("profile", *words)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert not ResultsStore(home / "results").records()


@pytest.mark.parametrize("words", [("base", "--batch", "many"), ("base", "kan", "--kernels")])
def test_what_is_no_usage_leaves_with_2(home: Path, kallm: Run, words: tuple[str, ...]) -> None:
    assert kallm("profile", *words)[0] == 2


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_loaded(
    home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "load_weights", lambda *arguments: pytest.fail("a model was loaded"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**16, total=2 * GIB))
    code, _, err = kallm("profile", "base", *SMALL)
    assert code == 1
    assert "base: predicted not to fit: 0.0 GiB and activations, and the machine has 0.0 GiB free of 2.0 GiB" in err
    assert "take --dtype bfloat16, a smaller model, or a smaller --batch and --length" in err


def test_what_fits_a_gpu_is_asked_of_the_gpu(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(vocab_size=97)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * 64 * cache_bytes(model.config, torch.float32)
    monkeypatch.setattr(room, "give_back", lambda device: None)
    settings, device = ProfileSettings(2, 64, batches=(1,), lengths=(32,)), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (weights + cache, 8 * GIB))
    room.check_room(["a"], [model], settings, device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (weights + cache - 1, 8 * GIB))
    with pytest.raises(DeviceError, match=r"the GPU has 0\.0 GiB free of 8\.0 GiB; take .* --device cpu"):
        room.check_room(["a"], [model], settings, device)
    with pytest.raises(DeviceError, match="a and b"):
        room.check_room(["a", "b"], [model, model], settings, device)
