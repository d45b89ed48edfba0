"""Figures of cost: the arithmetic by hand, and memory against an allocation of known size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kallm_bench.errors import DeviceError
from kallm_bench.models import KANSpec, retrofit
from kallm_bench.profiling import ProfileSettings, Rig, find_device, find_dtype, flops_per_token, measure_training
from kallm_bench.profiling.flops import peak_flops, training_flops
from kallm_bench.profiling.memory import peak_memory
from kallm_bench.profiling.rig import Measured
from kallm_bench.training import apply_scope

CPU = torch.device("cpu")


def test_flops_are_two_for_each_weight_of_a_product(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # 4 heads of 8, 2 of keys and values
    feedforward, head = 3 * 32 * 64, 32 * 97
    assert flops_per_token(model) == 2 * (4 * (attention + feedforward) + head)
    retrofit(model, KANSpec("3", "cheby2"))  # 32 -> 16 -> 32, two functions an edge
    assert flops_per_token(model) == 2 * (4 * attention + 3 * feedforward + 2 * 2 * 32 * 16 + head)


def test_a_figure_is_the_median_with_its_samples_and_tells_of_a_wide_spread() -> None:
    metric = Measured((1.0, 2.0, 4.0), notes=("heat",)).metric("prefill_tokens_per_second", lambda each: 100 / each)
    assert metric.value == 50.0
    assert list(metric.samples) == [100.0, 50.0, 25.0]
    assert metric.note == "spread 150%; heat"
    assert Measured((1.0, 1.01, 0.99)).metric("prefill_seconds").note == ""
    missing = Measured(reason="out of memory").metric("prefill_seconds")
    assert (missing.value, missing.n, missing.note) == (None, 0, "out of memory")


def test_peak_memory_is_of_the_block_alone() -> None:
    size = 200 * 2**20
    np.ones(2 * size, dtype=np.uint8)  # larger, before, and gone
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as during:
        np.ones(size, dtype=np.uint8)
    grown = (during[0].value or 0) - (before[0].value or 0)
    assert during[0].name == "peak_resident_bytes"
    assert 0.9 * size < grown < 1.3 * size


def test_a_profile_leaves_the_weights_alone(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("2-3", "cheby2"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = ProfileSettings(1, 32, repeats=2, scopes=("lora", "all"))
    measure_training([model], settings, Rig(CPU, repeats=2), torch.bfloat16)
    assert set(model.state_dict()) == set(before)  # adapters are gone
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_steps_are_measured_in_every_way(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("2-3", "cheby2"))
    settings = ProfileSettings(2, 64, repeats=2, ways=("plain", "ours", "kept"))
    (metrics,) = measure_training([model], settings, Rig(CPU, repeats=2))
    found = {metric.name: metric for metric in metrics}
    for way in ("", "/plain", "/kept"):
        assert found[f"train_tokens_per_second{way}"].n == 2
        assert found[f"peak_resident_bytes{way}"].value
        assert found[f"train_mfu{way}"].value is None
        assert found[f"train_mfu{way}"].note == "no data sheet is known of this device"
    with pytest.raises(DeviceError, match=r"no way 'plane'\. Did you mean 'plain'"):
        ProfileSettings(ways=("plane",))


def test_a_training_step_needs_gradients_only_where_something_learns(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("3", "cheby2"))  # 32 -> 16 -> 32, two functions an edge
    attention, feedforward, head, kan = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 64, 32 * 97, 2 * 2 * 32 * 16
    apply_scope(model, "tail")
    below = 3 * (attention + feedforward)
    assert training_flops(model, bearing=0.5) == 2 * (below + 3 * (attention + kan) + 2 * head * 0.5)
    model = tiny_llama(vocab_size=97)
    apply_scope(model, "all")
    assert training_flops(model) == 3 * flops_per_token(model)


def test_an_unknown_device_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    known = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12}
    unknown = ["NVIDIA Nothing 1", "NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    for name, expected in {**known, **dict.fromkeys(unknown)}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == expected, name


def test_what_measures_nothing_or_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="repeats must be at least 2"):
        ProfileSettings(repeats=1)
    with pytest.raises(DeviceError, match="no device 'tpu'"):
        find_device("tpu")
    assert find_dtype("auto", torch.device("cpu")) == torch.float32
    assert find_dtype("auto", torch.device("cuda")) == torch.bfloat16
