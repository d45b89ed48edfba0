"""What `kallm profile` tells of an NVIDIA GPU: memory four ways, energy, limits, two models in turn."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

from kallm_bench.models import KANSpec, retrofit, save_checkpoint
from kallm_bench.profiling import ProfileSettings, Rig, environment, measure_inference, measure_parts, measure_training
from kallm_bench.profiling.flops import limits_of
from kallm_bench.profiling.hardware import Gpu
from kallm_bench.profiling.memory import peak_memory
from kallm_bench.profiling.room import too_large
from kallm_bench.records import Metric, ResultsStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
MIB = 2**20
PEAK = "peak_vram_allocated_bytes"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def gpu() -> Gpu:
    torch.zeros(1, device=CUDA)  # a context, without which no process computes there
    gpu = Gpu(CUDA)
    if gpu.missing:
        pytest.skip(gpu.missing)
    return gpu


def named(metrics: list[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


def test_memory_is_told_four_ways_and_each_holds_the_one_before(gpu: Gpu) -> None:
    size = 1024 * MIB
    with peak_memory(CUDA, gpu, "/load") as before:
        gpu.look()
    with peak_memory(CUDA, gpu, "/load") as peaks:
        held = torch.empty(size, dtype=torch.uint8, device=CUDA)
        gpu.look()
        del held
    grown = {
        metric.name: (metric.value or 0) - (other.value or 0)
        for metric, other in zip(peaks, before, strict=True)
        if metric.value is not None
    }
    values = [metric.value for metric in peaks if metric.value is not None]
    assert values == sorted(values)
    assert grown.pop("peak_vram_allocated_bytes/load") == size
    # another process may come and go on the device, and the allocator's unit is 2 MiB
    assert all(0.9 * size <= each <= 1.5 * size for each in grown.values()), grown
    assert {metric.note for metric in peaks if metric.value is None} <= {
        "NVML does not list this process; in a container it often cannot",
        "NVML does not say what each process holds",
    }


def test_energy_and_the_state_of_the_clock_are_read(gpu: Gpu) -> None:
    if gpu.joules().value is None:
        pytest.skip(gpu.joules().reason)
    x = torch.randn(4096, 4096, device=CUDA, dtype=torch.bfloat16)
    rig = Rig(CUDA, gpu, repeats=3)
    (measured,) = rig.measure("x", [lambda: rig.clocked(lambda: [x @ x for _ in range(20)])])
    metric = measured.joules_per_token("prefill_joules_per_token", 20 * 2 * 4096**3)
    assert metric.n >= 2
    seconds = sum(measured.seconds) / len(measured.seconds)
    watts = (measured.joules.value or 0) / seconds
    assert 30 < watts < 1500, watts
    assert len(gpu.looks) > 3


def test_products_stay_below_the_data_sheet() -> None:
    limits = limits_of(CUDA, torch.bfloat16)
    if limits is None:
        pytest.skip(f"no data sheet of {torch.cuda.get_device_name(CUDA)}")
    x = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    y = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
    rig = Rig(CUDA, repeats=5)
    product, copy = rig.measure("x", [lambda: rig.clocked(lambda: x @ x), lambda: rig.clocked(lambda: y.add_(1))])
    assert 0.3 < 2 * 8192**3 / limits.flops / min(product.seconds) < 1.05
    assert 0.3 < 2 * 2**30 / limits.bandwidth / min(copy.seconds) < 1.05


def test_inference_of_two_models_in_turn(tiny_llama: Any) -> None:
    models = [tiny_llama(vocab_size=997, dtype=torch.bfloat16).to(CUDA) for _ in range(2)]
    retrofit(models[1], KANSpec("2-3", "cheby2"))
    settings = ProfileSettings(2, 64, batches=(1, 2), lengths=(32, 64), new_tokens=8, repeats=3)
    rig = Rig.at(CUDA, 3)
    for metrics in measure_inference(models, settings, rig):
        found = named(metrics)
        for part in ("", "/1x32", "/1x64", "/2x32"):
            assert len(found[f"prefill_seconds{part}"].samples) == 3
            assert (found[f"decode_tokens_per_second{part}"].value or 0) > 0
        for name in ("prefill_mfu", "prefill_roofline", "decode_roofline"):
            value = found[name].value
            assert value is None or 0 < value < 1
        for phase in ("prefill", "decode"):
            allocated, reserved = (found[f"peak_vram_{way}_bytes/{phase}"].value for way in ("allocated", "reserved"))
            assert 0 < (allocated or 0) <= (reserved or 0)
            assert f"peak_vram_process_bytes/{phase}" in found
            assert f"peak_vram_device_bytes/{phase}" in found
    assert all(parameter.is_cuda for model in models for parameter in model.parameters())
    assert not any(parameter.is_inference() for model in models for parameter in model.parameters())


def test_parts_are_timed_by_events(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=997, dtype=torch.bfloat16).to(CUDA)
    retrofit(model, KANSpec("2-3", "cheby2"))
    (metrics,) = measure_parts([model], ProfileSettings(2, 64, new_tokens=8), Rig.at(CUDA, 5))
    found = named(metrics)
    for phase in ("prefill", "decode"):
        for part in ("attention", "feed-forward", "kan", "head", "rest"):
            value = found[f"{phase}_part_seconds/{part}"].value
            assert value is not None
            assert 0 < value < 1, part


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "in turn"])
def test_training_in_every_scope(tiny_llama: Any, count: int) -> None:
    models = [tiny_llama(vocab_size=997, hidden_size=256, intermediate_size=512).to(CUDA) for _ in range(count)]
    for model in models:
        retrofit(model, KANSpec("2-3", "cheby2"))
    settings = ProfileSettings(4, 128, repeats=3, scope="tail", scopes=("all", "lora"), ways=("ours", "kept", "plain"))
    for metrics in measure_training(models, settings, Rig.at(CUDA, 3), torch.bfloat16):
        found = named(metrics)
        for part in ("", "/all", "/lora", "/kept", "/plain"):
            assert len(found[f"train_tokens_per_second{part}"].samples) == 3
            allocated, reserved = (found[f"peak_vram_{way}_bytes{part}"].value for way in ("allocated", "reserved"))
            assert 0 < (allocated or 0) <= (reserved or 0)
            mfu = found[f"train_mfu{part}"].value
            assert mfu is None or 0 < mfu < 1
    assert "driver" in environment(CUDA)["gpu"]


def test_what_does_not_fit_is_predicted_and_tried(tiny_llama: Any) -> None:
    free, there = torch.cuda.mem_get_info(CUDA)
    assert too_large(free // 2, CUDA) == ""
    assert f"free of {there / 2**30:.1f} GiB" in too_large(2 * there, CUDA)
    model = tiny_llama(vocab_size=997, dtype=torch.bfloat16, max_position_embeddings=4096).to(CUDA)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + 256 * MIB) / there)
    try:
        settings = ProfileSettings(1, 32, batches=(1, 512), lengths=(32, 2048), new_tokens=8, repeats=2)
        (metrics,) = measure_inference([model], settings, Rig.at(CUDA, 2))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = named(metrics)
    assert (found["prefill_seconds"].value or 0) > 0
    assert (found["prefill_seconds/512x2048"].value, found["prefill_seconds/512x2048"].note) == (None, "out of memory")


def test_a_profile_holds_nothing_of_the_one_before(
    tiny_llama: Any, tmp_path: Path, monkeypatch: Any, kallm: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    loaded = []
    for seed in range(2):
        save_checkpoint(f"{seed}", tiny_llama(seed=seed, vocab_size=997, hidden_size=256, intermediate_size=512))
        code, out, err = kallm("profile", f"{seed}", "--batch", "4", "--length", "128", "--repeats", "3", "--json")
        assert code == 0, err
        loaded += [each["value"] for each in json.loads(out)[0]["metrics"] if each["name"] == f"{PEAK}/load"]
    first, second = loaded
    assert second <= first + MIB, "what cuBLAS keeps for streams that are gone would be 32 MiB each"


def test_two_checkpoints_by_the_command(tiny_llama: Any, tmp_path: Path, monkeypatch: Any, kallm: Run) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    model = tiny_llama(vocab_size=997, hidden_size=256, intermediate_size=512)
    save_checkpoint(tmp_path / "base", model)
    retrofit(model, KANSpec("2-3", "cheby2"))
    save_checkpoint(tmp_path / "kan", model)
    words = ("--batch", "1,4", "--length", "128", "--repeats", "3", "--scope", "tail")
    code, out, err = kallm("profile", "base", "kan", *words, "--json")
    assert code == 0, err
    first, second = json.loads(out)
    assert first["settings"]["device"] == "cuda"
    found = {metric["name"]: metric for metric in second["metrics"]}
    for name in ("prefill_seconds", "decode_seconds/1x128", "train_tokens_per_second", "peak_vram_allocated_bytes"):
        assert found[f"ratio/{name}"]["value"] > 0, name
    for phase in ("/load", "/prefill", "/decode", ""):
        assert found[f"peak_vram_device_bytes{phase}"]["value"] or found[f"peak_vram_device_bytes{phase}"]["note"]
    assert len(ResultsStore(tmp_path / "results").records()) == 2
