"""Training: what is packed, what learns, and that a stopped run ends with the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from kallm_bench.errors import DataError, Interrupted, TrainingError
from kallm_bench.models import KANSpec, retrofit
from kallm_bench.progress import nobody
from kallm_bench.training import SCHEDULES, SCOPES, TrainSettings, apply_scope, loop, parameters_in, prepare, train
from kallm_bench.training.data import IGNORE, Template
from kallm_bench.training.forward import Forward, make_batch
from kallm_bench.training.optimiser import make_optimiser, rate_share, set_rate

CHAT = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "\n6, I think"},
    ],
]
GOLDEN_LOSSES = [10.83190, 10.80989, 10.65261, 10.67655, 10.68972, 10.70056, 10.51415, 10.65640]
SMALL = TrainSettings(tokens=8 * 2 * 32, row_length=32, rows_per_step=2, scope="tail", heldout_rows=4)


def write_chat(path: Path, conversations: list[list[dict[str, str]]]) -> str:
    text = "".join(json.dumps({"messages": conversation}) + "\n" for conversation in conversations)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.fixture
def rows(bundled_tokenizer: Any, tmp_path: Path) -> Any:
    source = write_chat(tmp_path / "chat.jsonl", CHAT * 40)
    return prepare(source, bundled_tokenizer, 32, tmp_path / "cache")


def test_only_the_assistants_words_and_their_end_bear_loss(bundled_tokenizer: Any, tmp_path: Path) -> None:
    source = write_chat(tmp_path / "one.jsonl.gz", CHAT[1:] * 3)
    packed, _ = prepare(source, bundled_tokenizer, 50, tmp_path / "cache", heldout=source)
    batch = packed.batch(range(len(packed)))
    learned = batch["targets"][batch["targets"] != IGNORE]
    assert bundled_tokenizer.decode(learned).startswith(
        "4<|im_end|>6, I think<|im_end|>"
    )  # the line break began before
    follows = batch["input_ids"].roll(-1, dims=1)
    assert torch.equal(batch["targets"][batch["targets"] != IGNORE], follows[batch["targets"] != IGNORE])


def test_nothing_is_lost_or_invented_in_packing(bundled_tokenizer: Any, tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", CHAT * 5)
    packed, _ = prepare(source, bundled_tokenizer, 16, tmp_path / "cache", heldout=source)
    template = Template(bundled_tokenizer)
    whole = [
        token
        for conversation in CHAT * 5
        for token in bundled_tokenizer(template.spans(conversation)[0], add_special_tokens=False)["input_ids"]
    ]
    tokens = packed.tokens[:].reshape(-1).tolist()
    assert tokens == whole[: len(tokens)]
    assert len(whole) - len(tokens) < 16


def test_packed_documents_neither_see_nor_shift_each_other(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    """The loss of two conversations in one row is the sum of their losses alone."""
    model = tiny_llama()
    template = Template(bundled_tokenizer)
    lengths = [len(bundled_tokenizer(template.spans(one)[0], add_special_tokens=False)["input_ids"]) for one in CHAT]
    source = write_chat(tmp_path / "both.jsonl", CHAT)
    packed, _ = prepare(source, bundled_tokenizer, sum(lengths), tmp_path / "cache", heldout=source)
    with Forward(model) as forward:
        together, tokens = forward.loss_sum(make_batch(packed, [0]))
    alone = torch.zeros(())
    for number, one in enumerate(CHAT):
        text, spans = template.spans(one)
        cut = bundled_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        bears = [any(first <= begin < last for first, last in spans) for begin, _ in cut["offset_mapping"]]
        logits = model(torch.tensor([cut["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(cut["input_ids"][1:])
        mask = torch.tensor(bears[1:])
        alone = alone + F.cross_entropy(logits[mask], targets[mask], reduction="sum")
        tokens -= int(mask.sum())
        assert lengths[number] == len(cut["input_ids"])
    assert tokens == 0
    assert float(together.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)


def test_heldout_conversations_are_never_trained_on(bundled_tokenizer: Any, tmp_path: Path) -> None:
    talk = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"number {n} " * 20}] for n in range(200)
    ]
    source = write_chat(tmp_path / "chat.jsonl", talk)
    learned, kept = prepare(source, bundled_tokenizer, 64, tmp_path / "cache")
    held_out = bundled_tokenizer.decode(np.concatenate(kept.tokens))
    trained = bundled_tokenizer.decode(np.concatenate(learned.tokens))
    assert "number 50 " in held_out
    assert "number 50 " not in trained
    assert "number 51 " in trained


def test_a_byte_order_mark_is_no_broken_line(bundled_tokenizer: Any, tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", CHAT * 60)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + Path(source).read_bytes())
    plain, marked = (
        prepare(name, bundled_tokenizer, 16, tmp_path / "cache")[0] for name in (source, str(tmp_path / "marked.jsonl"))
    )
    assert np.array_equal(plain.tokens, marked.tokens)


def test_every_broken_line_is_named(bundled_tokenizer: Any, tmp_path: Path) -> None:
    held_out = write_chat(tmp_path / "heldout.jsonl", CHAT * 60)

    def refusal(text: str, name: str = "bad.jsonl", row_length: int = 16) -> str:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as error:
            prepare(str(tmp_path / name), bundled_tokenizer, row_length, tmp_path / "cache", heldout=held_out)
        assert "\n" not in str(error.value)
        return str(error.value)

    good = json.dumps({"messages": CHAT[0]}) + "\n"
    assert "line 2: not JSON" in refusal(good + "{oops\n")
    assert "line 2: needs" in refusal(good + '{"text": "no messages"}\n')
    assert "line 1: no role 'asistant'. Did you mean" in refusal(
        '{"messages": [{"role": "asistant", "content": "x"}]}\n'
    )
    assert "line 1: a message needs" in refusal('{"messages": [{"role": "user"}]}\n')
    assert "no conversations" in refusal("")
    assert "half a character" in refusal('{"messages": [{"role": "user", "content": "\\ud83d"}]}\n')
    assert "line 1: not JSON" in refusal("[" * 100_000)
    assert "do not fill a row" in refusal(good, "short.jsonl", row_length=500)
    with pytest.raises(DataError, match="no data file"):
        prepare("gone.jsonl", bundled_tokenizer, 16, tmp_path)
    assert not list((tmp_path / "cache").glob("**/*.partial"))


def test_scopes_learn_what_they_say(tiny_llama: Any) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scopes = {scope: {names[id(p)] for p in parameters_in(model, scope)} for scope in SCOPES if scope != "lora"}
    assert all("mlp.layers" in name for name in scopes["replaced"])
    assert {name.split(".")[2] for name in scopes["tail"] if "layers" in name} == {"2", "3"}
    assert scopes["tail"] - scopes["replaced"] >= {"model.norm.weight"}
    assert scopes["tail+head"] - scopes["tail"] == {"model.embed_tokens.weight"}
    assert scopes["all"] == set(names.values())
    with pytest.raises(TrainingError, match="take --scope all or lora, or tail_from in a suite"):
        parameters_in(tiny_llama(), "tail")
    with pytest.raises(TrainingError, match="Did you mean 'tail'"):
        parameters_in(model, "tial")


def test_a_tied_embedding_learns_through_the_head_alone(tiny_llama: Any, rows: Any) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("3", "cheby2"))
    batch = rows[0].batch([0, 1])
    weight = model.get_input_embeddings().weight
    apply_scope(model, "tail+head")
    with Forward(model) as forward:
        (gradient,) = torch.autograd.grad(forward.loss_sum(make_batch(rows[0], [0, 1]))[0], [weight])

    hidden = model.get_decoder()(input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0]
    bears = batch["targets"] != IGNORE
    loss = F.cross_entropy(hidden[bears].detach() @ weight.T, batch["targets"][bears], reduction="sum")
    (head_only,) = torch.autograd.grad(loss, [weight])
    torch.testing.assert_close(gradient, head_only)


@pytest.mark.parametrize("basis", ["linear", "cheby2"])
def test_training_lowers_the_loss_and_touches_its_scope_alone(
    tiny_llama: Any, rows: Any, tmp_path: Path, basis: str
) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", basis))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = {id(parameter) for parameter in parameters_in(model, "tail")}
    learned = {name for name, parameter in model.named_parameters() if id(parameter) in learning}
    settings = TrainSettings(tokens=30 * 64, row_length=32, rows_per_step=2, learning_rate=1e-2, heldout_rows=4)
    result = train(model, *rows, settings, tmp_path / "state")
    assert result.heldout_after < result.heldout_before - 0.05
    assert len(result.losses) == settings.steps == 30
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == (name in learned), name


@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_a_stopped_run_ends_with_the_same_bits(tiny_llama: Any, rows: Any, tmp_path: Path, stop_at: int) -> None:
    """A signal comes in some step: that step is finished and saved, and the rest is done by the next run."""

    def fresh() -> Any:
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        return model

    whole, resumed = fresh(), fresh()
    expected = train(whole, *rows, SMALL, tmp_path / "whole")

    def interrupt(work: str, done: int, total: int, note: str = "") -> None:
        if work == "training" and done == stop_at:
            signal.raise_signal(signal.SIGINT)

    state = tmp_path / "state"
    with pytest.raises(Interrupted) as stopped:
        train(resumed, *rows, SMALL, state, watch=interrupt)
    assert stopped.value.exit_code == 130
    assert [path.name for path in state.iterdir()] == [f"step-{stop_at:08d}"]

    resumed = fresh()
    result = train(resumed, *rows, SMALL, state)
    assert result == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_size_of_a_batch_changes_memory_and_not_the_result(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    results = []
    for batch_rows in (1, 2):
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        settings = TrainSettings(tokens=4 * 128, row_length=32, rows_per_step=4, heldout_rows=4)
        results.append(train(model, *rows, settings, tmp_path / str(batch_rows), batch_rows=batch_rows))
    torch.testing.assert_close(torch.tensor(results[0].losses), torch.tensor(results[1].losses), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_long_step_is_left_between_two_batches_and_costs_only_itself(
    tiny_llama: Any, rows: Any, tmp_path: Path, number: int
) -> None:
    def fresh() -> Any:
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        return model

    whole, resumed, seen = fresh(), fresh(), [0]
    settings = TrainSettings(tokens=512, row_length=32, rows_per_step=8)
    expected = train(whole, *rows, settings, tmp_path / "whole", batch_rows=2)

    def count(module: Any, inputs: Any) -> None:
        seen[0] += torch.is_grad_enabled()
        if seen[0] == 6 and torch.is_grad_enabled():  # the second batch of the second step
            signal.raise_signal(number)

    resumed.get_decoder().register_forward_pre_hook(count)
    told: list[str] = []
    with pytest.raises(Interrupted) as stopped:
        train(resumed, *rows, settings, tmp_path / "s", batch_rows=2, watch=lambda work, *rest: told.append(work))
    assert stopped.value.exit_code == 128 + number
    assert seen == [6]
    assert "stopping; Ctrl-C again stops at once" in told
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["step-00000001"]
    resumed = fresh()
    assert train(resumed, *rows, settings, tmp_path / "s", batch_rows=2) == expected


def test_a_killed_run_goes_on_from_its_last_state(
    tiny_llama: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is caught when a process is killed: what counts is what the minutely state left on the disk."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", math.inf)
    killed = RuntimeError("as if killed")

    def kill(work: str, done: int, total: int, note: str = "") -> None:
        if work == "training" and done == 5:
            raise killed

    def fresh() -> Any:
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        return model

    expected = train(fresh(), *rows, SMALL, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="as if killed"):
        train(fresh(), *rows, SMALL, tmp_path / "state", watch=kill)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000004"]
    first: list[int] = []

    def note(work: str, done: int, total: int, note: str = "") -> None:
        if work == "training":
            first.append(done)

    assert train(fresh(), *rows, SMALL, tmp_path / "state", watch=note) == expected
    assert first[0] == 5


def test_seeds_permute_the_same_rows(
    tiny_llama: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rows that are enough, each once, so that what is kept of them serves every seed."""
    seen: list[int] = []
    batch = loop.Rows.batch
    monkeypatch.setattr(loop.Rows, "batch", lambda rows, numbers, *more: seen.extend(numbers) or batch(rows, numbers))
    losses, orders = [], []
    for seed in (0, 0, 1):
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        settings = TrainSettings(tokens=4 * 64, row_length=32, rows_per_step=2, heldout_rows=2, seed=seed)
        losses.append(train(model, *rows, settings, tmp_path / f"{len(losses)}").losses)
        orders.append(seen[4:-2])  # two rows to check the architecture, and the held-out rows before and after
        seen.clear()
    assert losses[0] == losses[1] != losses[2]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss of step 1 is nan"):
        train(model, *rows, SMALL, tmp_path / "state")


def test_settings_that_cannot_be_are_refused(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="do not fill one step"):
        TrainSettings(tokens=100)
    with pytest.raises(TrainingError, match="rows_per_step must be at least 1"):
        TrainSettings(rows_per_step=0)
    for wrong in (
        {"warmup": 2.0}, {"weight_decay": -1.0}, {"clip_norm": 0.0}, {"learning_rate": math.nan}, {"tail_from": -1},
        {"new_learning_rate": 0.0}, {"final_share": 1.5}, {"decay_share": -0.1}, {"betas": (0.9, 1.0)}, {"betas": ()},
        {"schedule": "cosin"}, {"schedule": "wsd", "decay_share": 1.0},
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=next(iter(wrong))):
            TrainSettings(**wrong)
    model = tiny_llama()
    retrofit(model, KANSpec("3", "cheby2"))
    with pytest.raises(TrainingError, match="take at most"):
        train(model, *rows, TrainSettings(tokens=10**6, row_length=32, rows_per_step=2), tmp_path)


@pytest.mark.parametrize("tokens", [0, SMALL.tokens])
def test_rows_longer_than_a_model_reads_are_refused(tiny_llama: Any, rows: Any, tmp_path: Path, tokens: int) -> None:
    settings = dataclasses.replace(SMALL, tokens=tokens, scope="all")
    train(tiny_llama(max_position_embeddings=32), *rows, settings, None)
    with pytest.raises(TrainingError, match=r"rows of 32 tokens .* the model reads at once; take rows of at most 31"):
        train(tiny_llama(max_position_embeddings=31), *rows, settings, None)


def test_data_in_which_nobody_answers_trains_nothing(
    tiny_llama: Any, rows: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    asked = [[{"role": "user", "content": f"Question {number}, and then another one?"}] for number in range(200)]
    source = write_chat(tmp_path / "asked.jsonl", asked)
    silent, _ = prepare(source, bundled_tokenizer, 32, tmp_path / "cache")
    settings = dataclasses.replace(SMALL, scope="all")
    with pytest.raises(TrainingError, match="no token of the training rows is the assistant's"):
        train(tiny_llama(), silent, rows[1], settings, None)
    with pytest.raises(TrainingError, match="no token of the held-out rows is the assistant's"):
        train(tiny_llama(), rows[0], silent, settings, None)


def test_no_tokens_measure_and_change_nothing(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = train(model, *rows, TrainSettings(tokens=0, row_length=32, heldout_rows=4), tmp_path)
    assert result.heldout_before == result.heldout_after
    assert result.losses == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_rate_warms_up_and_falls_as_a_cosine_to_a_tenth(tiny_llama: Any) -> None:
    settings = TrainSettings(tokens=100 * 64, row_length=32, rows_per_step=2, learning_rate=1.0, warmup=0.1)
    model = tiny_llama()
    optimiser = make_optimiser(model, dict(model.named_parameters()), settings)
    rates = []
    for step in range(settings.steps):
        set_rate(optimiser, settings, step)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55, abs=0.01)  # half-way down
    assert 0.1 <= rates[-1] < 0.101
    assert all(group["weight_decay"] == 0.0 for group in optimiser.param_groups)


def rates(settings: TrainSettings) -> list[float]:
    return [rate_share(settings, step) for step in range(settings.steps)]


def test_schedules_are_what_they_say() -> None:
    settings = TrainSettings(tokens=100 * 64, row_length=32, rows_per_step=2, warmup=0.1, final_share=0.2)
    linear, constant, stable = (
        rates(dataclasses.replace(settings, schedule=name, decay_share=0.3)) for name in ("linear", "constant", "wsd")
    )
    assert linear[:10] == constant[:10] == stable[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert linear[10:] == pytest.approx([1 - 0.8 * n / 90 for n in range(90)])
    assert constant[10:] == [1.0] * 90
    assert stable[10:71] == [1.0] * 61
    assert stable[70:] == pytest.approx([1 - 0.8 * n / 30 for n in range(30)])
    assert set(SCHEDULES) == {"cosine", "linear", "constant", "wsd"}


def test_new_modules_have_their_rate_and_only_matrices_decay(tiny_llama: Any) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("2", "cheby2"))
    retrofit(model, KANSpec("3", "rational", form="glu"))
    settings = TrainSettings(learning_rate=0.1, new_learning_rate=0.3, weight_decay=0.5)
    optimiser = make_optimiser(model, dict(model.named_parameters()), settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["peak"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, (rate, decay) in found.items():
        new = "layers.2.mlp" in name or "layers.3.mlp" in name
        assert rate == (0.3 if new else 0.1), name
        learns_a_function = "numerator" in name or "denominator" in name
        assert decay == (0.5 if model.get_parameter(name).ndim > 1 and not learns_a_function else 0.0), name
    assert sum("denominator" in name for name in found) == 1


class Narrow(nn.Module):
    """A model that has memory for so many rows, in the forward pass or in the backward pass of its first block."""

    def __init__(self, model: Any, most: int, where: str) -> None:
        super().__init__()
        self.most, self.where = most, where
        model.get_decoder().register_forward_pre_hook(self.look, with_kwargs=True)
        model.get_decoder().layers[2].register_forward_hook(self.lay)

    def look(self, module: Any, inputs: Any, named: Any) -> None:
        if self.where == "forward" and len(named["input_ids"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def lay(self, module: Any, inputs: Any, output: Any) -> None:
        if self.where == "backward" and output.requires_grad and len(output) > self.most:
            output.register_hook(self.fail)

    def fail(self, gradient: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_too_little_memory_halves_the_batch_and_changes_nothing_else(
    tiny_llama: Any, rows: Any, tmp_path: Path, where: str
) -> None:
    """The step that fails is done anew: what it had added to the gradient is gone."""
    settings = TrainSettings(tokens=3 * 8 * 32, row_length=32, rows_per_step=8, heldout_rows=4, learning_rate=1e-2)

    def run(name: str, batch_rows: int, most: int) -> tuple[Any, Any, list[str]]:
        model, told = tiny_llama(), []
        retrofit(model, KANSpec("2-3", "cheby2"))
        Narrow(model, most, where)
        result = train(model, *rows, settings, tmp_path / name, batch_rows=batch_rows,
                       watch=lambda work, *rest: told.append(work))  # fmt: skip
        return result, model, told

    expected, truth, _ = run("two", 2, 2)
    result, model, told = run("eight", 8, 3)
    for name, value in truth.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert result.losses == expected.losses
    words = [word for word in told if "memory" in word]
    assert words == [f"out of memory; going on with {n} rows at once, 8 were asked for" for n in (4, 2)]
    if where == "backward":
        with pytest.raises(TrainingError, match="out of memory with one row at once; take a shorter --row-length"):
            run("none", 8, 0)


def test_a_batch_that_was_halved_stays_so_when_the_run_goes_on(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    settings = TrainSettings(tokens=3 * 4 * 32, row_length=32, rows_per_step=4, heldout_rows=4)
    told: list[str] = []

    def watch(work: str, done: int, total: int, note: str = "") -> None:
        told.append(work)
        if work == "training" and done == 1:
            signal.raise_signal(signal.SIGINT)

    for _ in range(2):
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        Narrow(model, 2, "backward")
        with contextlib.suppress(Interrupted):
            train(model, *rows, settings, tmp_path, batch_rows=4, watch=watch)
    assert sum("out of memory" in word for word in told) == 1
    assert sum(word == "training" for word in told) == 3


def test_float16_scales_its_loss_and_leaves_out_steps_that_overflow(
    tiny_llama: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scale is far too large: steps are left out until it fits. A stopped run keeps the scale it had."""
    settings = TrainSettings(tokens=12 * 64, row_length=32, rows_per_step=2, heldout_rows=4, learning_rate=1e-2)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(loop.torch.amp, "GradScaler", lambda *names, **more: scaler(*names, **more, init_scale=2.0**24))

    def run(folder: str, stop_at: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))

        def watch(work: str, done: int, total: int, note: str = "") -> None:
            if work == "training" and done == stop_at:
                signal.raise_signal(signal.SIGINT)

        result = train(model, *rows, settings, tmp_path / folder, autocast=torch.float16, watch=watch)
        return result, model.state_dict()

    whole, expected = run("whole")
    start = tiny_llama()
    retrofit(start, KANSpec("2-3", "cheby2"))
    moved = [name for name, value in start.state_dict().items() if not torch.equal(value, expected[name])]
    assert moved
    assert all(torch.isfinite(expected[name]).all() for name in moved)
    with pytest.raises(Interrupted):
        run("stopped", 5)
    note = json.loads((tmp_path / "stopped" / "step-00000005" / "state.json").read_text())
    assert 1 <= note["scaler"]["scale"] < 2.0**24
    resumed, weights = run("stopped")
    assert resumed == whole
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())


def test_a_loss_scale_below_one_stops(
    tiny_llama: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    model.model.layers[3].register_full_backward_hook(
        lambda module, gradients, outputs: (torch.full_like(gradients[0], math.inf),)
    )
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(loop.torch.amp, "GradScaler", lambda *names, **more: scaler(*names, **more, init_scale=4.0))
    with pytest.raises(TrainingError, match="the gradient of step 3 is too large for float16"):
        train(model, *rows, SMALL, tmp_path, autocast=torch.float16)


def test_a_gradient_that_is_not_finite_stops_before_anything_moves(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    """Where the loss is still finite, moving by such a gradient would spoil the state that is kept."""
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    passes = [0]

    def spoil(module: Any, gradients: Any, outputs: Any) -> Any:
        passes[0] += 1
        return (gradients[0] * (math.nan if passes[0] == 3 else 1),)

    model.model.layers[3].register_full_backward_hook(spoil)
    with pytest.raises(TrainingError, match="the gradient of step 3 is nan; the state before it is kept"):
        train(model, *rows, SMALL, tmp_path / "state")
    (saved,) = (tmp_path / "state").iterdir()
    assert saved.name == "step-00000002"
    assert all(torch.isfinite(value).all() for value in load_file(saved / "state.safetensors").values())


def test_a_curriculum_is_told_of_every_step_and_of_the_end(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    told: list[Any] = []

    class Listener:
        def set(self, step: int) -> None:
            told.append(step)

        def finish(self) -> None:
            told.append("finished")

    def interrupt(work: str, done: int, total: int, note: str = "") -> None:
        if work == "training" and done == 3:
            signal.raise_signal(signal.SIGINT)

    for watch in (interrupt, nobody):
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        with contextlib.suppress(Interrupted):
            train(model, *rows, SMALL, tmp_path, watch=watch, curriculum=Listener())
    assert told == [0, 1, 2, 3, 3, 4, 5, 6, 7, "finished"]


def test_one_loss_curve_does_not_drift(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    """Golden: change it knowingly, and raise the version of training's code with it."""
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    settings = TrainSettings(tokens=8 * 64, row_length=32, rows_per_step=2, learning_rate=1e-2, clip_norm=0.5)
    losses = train(model, *rows, settings, tmp_path).losses
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=2e-4)


def test_autocast_is_used_and_parameters_stay_float32(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    losses = []
    for autocast in (None, torch.bfloat16, torch.float16):
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        losses.append(train(model, *rows, SMALL, tmp_path / str(autocast), autocast=autocast).losses)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1] != losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[0], rel=5e-3)


def test_a_step_that_was_finished_is_never_done_again(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    """Stopped after the last step, while the held-out loss is taken: only that is left to do."""
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    seen = []

    def interrupt(work: str, done: int, total: int, note: str = "") -> None:
        seen.append(work)
        if work == "held-out loss" and "training" in seen:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, *rows, SMALL, tmp_path / "state", watch=interrupt)
    seen.clear()
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    result = train(model, *rows, SMALL, tmp_path / "state", watch=lambda work, *rest: seen.append(work))
    assert set(seen) == {seen[0], "held-out loss"}
    assert seen[0].startswith("goes on from step 8 of 8")
    assert len(result.losses) == SMALL.steps
