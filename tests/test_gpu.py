"""The same promises on a CUDA device."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kallm_bench.bbh import evaluate
from kallm_bench.bbh.evaluate import EvalSettings, ask
from kallm_bench.bbh.samples import Unfinished
from kallm_bench.errors import Interrupted
from kallm_bench.kan import BASES, KANLinear
from kallm_bench.models import KANSpec, load_checkpoint, retrofit, save_checkpoint
from kallm_bench.training import (
    DistillationSettings,
    Forward,
    Teacher,
    TrainSettings,
    apply_scope,
    prepare,
    train,
)
from kallm_bench.training.data import FIRST, LEARN, Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", sorted(BASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_is_as_accurate_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = KANLinear(48, 29, name).to(dtype)
    x = torch.randn(37, 48).to(dtype)

    def output_and_gradients(device: str, kind: torch.dtype) -> list[torch.Tensor]:
        there = KANLinear(48, 29, name).to(device, kind)
        there.load_state_dict(layer.state_dict())
        mine = x.to(device, kind).requires_grad_(True)
        y = there(mine)
        gradients = torch.autograd.grad(y.sum(), [mine, *there.parameters()])
        return [tensor.detach().double().cpu() for tensor in (y, *gradients)]

    truth = output_and_gradients("cpu", torch.float64)
    reference = output_and_gradients("cpu", dtype)
    on_device = output_and_gradients("cuda", dtype)
    for true, ours, theirs in zip(truth, reference, on_device, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (theirs - true).abs().max() <= 2 * (ours - true).abs().max() + rounding


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_training_goes_down_and_comes_back(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, autocast: torch.dtype | None
) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there, how are you?"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 200)
    rows = prepare(str(tmp_path / "chat.jsonl"), bundled_tokenizer, 64, tmp_path / "cache")
    model = tiny_llama().to("cuda")
    retrofit(model, KANSpec("2-3", "cheby2"))
    settings = TrainSettings(tokens=40 * 128, row_length=64, rows_per_step=2, learning_rate=1e-2, heldout_rows=1)

    def interrupt(work: str, done: int, total: int, note: str = "") -> None:
        if work == "training" and done == 20:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(model, *rows, settings, tmp_path / "state", autocast=autocast, watch=interrupt)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model = tiny_llama().to("cuda")
    retrofit(model, KANSpec("2-3", "cheby2"))
    result = train(model, *rows, settings, tmp_path / "state", autocast=autocast)
    assert any(not torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert result.heldout_after < result.heldout_before - 0.05
    save_checkpoint(tmp_path / "ck", model)
    again, _ = load_checkpoint(tmp_path / "ck", device="cuda")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_batch_that_does_not_fit_is_halved(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there, how are you?"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 20_000)
    rows = prepare(str(tmp_path / "chat.jsonl"), bundled_tokenizer, 256, tmp_path / "cache")
    model = tiny_llama(hidden_size=256, intermediate_size=1024, num_key_value_heads=4).to("cuda")
    settings = TrainSettings(tokens=512 * 256, row_length=256, rows_per_step=512, scope="all", heldout_rows=1)
    told: list[str] = []
    torch.cuda.empty_cache()
    held = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(1.5e9 / held)
        train(model, *rows, settings, tmp_path / "state", batch_rows=512, watch=lambda work, *rest: told.append(work))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(word.startswith("out of memory; going on with") for word in told)


@pytest.mark.parametrize("arm", ["linear", "cheby2", "rational"])
@pytest.mark.parametrize("kept", [False, True], ids=["computed", "kept"])
@pytest.mark.parametrize("taught", [False, True], ids=["alone", "taught"])
def test_the_fast_way_is_as_near_the_truth_as_the_plain_one(
    tiny_llama: Any, tmp_path: Path, arm: str, kept: bool, taught: bool
) -> None:
    """Compiled blocks, packed attention, recorded graphs: loss and gradients of two batches, one after the other."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 997, (12, 128)).astype(np.uint16)
    flags = np.where(generator.random((12, 128)) < 0.4, LEARN, 0) | np.where(
        generator.random((12, 128)) < 0.05, FIRST, 0
    )
    rows = Rows(tokens, flags.astype(np.uint8), "some rows", "fingerprint")

    def figures(autocast: torch.dtype | None, fast: bool) -> list[torch.Tensor]:
        model = tiny_llama(vocab_size=997, hidden_size=256, intermediate_size=512).to("cuda")
        retrofit(model, KANSpec("2-3", arm, form="glu" if arm == "rational" else "stack"))
        apply_scope(model, "tail")
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = []
        base = tiny_llama(vocab_size=997, hidden_size=256, intermediate_size=512).to("cuda")
        teacher = Teacher(model, base, DistillationSettings(0.5)) if taught else None
        with Forward(model, autocast=autocast, fast=fast, teacher=teacher) as forward:
            if kept:
                forward.keep(tmp_path / str(autocast) / str(fast), {rows: len(rows)})
            assert not fast or forward.recording
            for _ in range(2):
                for numbers in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]):
                    batch = forward.batch(rows, numbers, 4)
                    forward.prefetch(rows, [4, 5, 6, 7])
                    objective = forward.objective(batch)
                    objective.total.backward()
                    forward.keep_gradients(learning)
                    with torch.no_grad():
                        rounding = {"rtol": 1e-5, "atol": 0.0} if taught else {"rtol": 0.0, "atol": 0.0}
                        torch.testing.assert_close(forward.loss_sum(batch)[0], objective.cross_entropy, **rounding)
                    found += [objective.total.detach(), objective.cross_entropy]
                forward.settle()
            found += [parameter.grad for parameter in learning]
        return [each.double().cpu() for each in found]

    truth, plain, fast = figures(None, False), figures(torch.bfloat16, False), figures(torch.bfloat16, True)
    for true, ours, theirs in zip(truth, plain, fast, strict=True):
        rounding = 4 * torch.finfo(torch.bfloat16).eps * true.abs().max()
        assert (theirs - true).abs().max() <= 2 * (ours - true).abs().max() + rounding


def test_replies_on_the_device(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path) -> None:
    settings = EvalSettings("chat", source="procedural", tasks=("navigate",), limit=5, max_new_tokens=4)
    exam = evaluate.prepare(settings, bundled_tokenizer)
    samples = ask(
        tiny_llama().to("cuda"), bundled_tokenizer, exam, Unfinished(tmp_path / "partial.jsonl"), batch_size=3
    )
    assert [sample["index"] for sample in samples] == list(range(5))
