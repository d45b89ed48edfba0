"""Training: what is packed, what learns, and that a stopped run ends with the same bits."""

from __future__ import annotations

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

from kallm_bench.errors import DataError, Interrupted, TrainingError
from kallm_bench.models import KANSpec, retrofit
from kallm_bench.training import SCOPES, TrainSettings, apply_scope, loop, parameters_in, prepare, train
from kallm_bench.training.data import IGNORE, Template
from kallm_bench.training.loss import loss_sum
from kallm_bench.training.optimiser import make_optimiser, set_rate

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
GOLDEN_LOSSES = [10.82101, 10.79846, 10.72243, 10.67208, 10.63595, 10.53562, 10.67593, 10.62781]
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
    assert packed.tokens.reshape(-1).tolist() == whole[: packed.tokens.size]
    assert len(whole) - packed.tokens.size < 16


def test_packed_documents_neither_see_nor_shift_each_other(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    """The loss of two conversations in one row is the sum of their losses alone."""
    model = tiny_llama()
    template = Template(bundled_tokenizer)
    lengths = [len(bundled_tokenizer(template.spans(one)[0], add_special_tokens=False)["input_ids"]) for one in CHAT]
    source = write_chat(tmp_path / "both.jsonl", CHAT)
    packed, _ = prepare(source, bundled_tokenizer, sum(lengths), tmp_path / "cache", heldout=source)
    together, tokens = loss_sum(model, packed.batch([0]))
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
    assert "line 1: role 'tool'" in refusal('{"messages": [{"role": "tool", "content": "x"}]}\n')
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
    scopes = {scope: {names[id(p)] for p in parameters_in(model, scope)} for scope in SCOPES}
    assert all("mlp.layers" in name for name in scopes["replaced"])
    assert {name.split(".")[2] for name in scopes["tail"] if "layers" in name} == {"2", "3"}
    assert scopes["tail"] - scopes["replaced"] >= {"model.norm.weight"}
    assert scopes["tail+head"] - scopes["tail"] == {"model.embed_tokens.weight"}
    assert scopes["all"] == set(names.values())
    with pytest.raises(TrainingError, match="needs replaced blocks"):
        parameters_in(tiny_llama(), "tail")
    with pytest.raises(TrainingError, match="Did you mean 'tail'"):
        parameters_in(model, "tial")


def test_a_tied_embedding_learns_through_the_head_alone(tiny_llama: Any, rows: Any) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("3", "cheby2"))
    batch = rows[0].batch([0, 1])
    weight = model.get_input_embeddings().weight
    apply_scope(model, "tail+head")
    (gradient,) = torch.autograd.grad(loss_sum(model, batch)[0], [weight])

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
        seen[0] += module.training
        if seen[0] == 6 and module.training:  # the second batch of the second step
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


def test_seeds_permute_the_same_rows(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        settings = TrainSettings(tokens=64, row_length=32, rows_per_step=2, heldout_rows=4, seed=seed)
        losses.append(train(model, *rows, settings, tmp_path / f"{len(losses)}").losses)
    assert losses[0] == losses[1] != losses[2]


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
    for wrong in ({"warmup": 2.0}, {"weight_decay": -1.0}, {"clip_norm": 0.0}, {"learning_rate": math.nan}):
        with pytest.raises(TrainingError, match=next(iter(wrong))):
            TrainSettings(**wrong)
    model = tiny_llama()
    retrofit(model, KANSpec("3", "cheby2"))
    with pytest.raises(TrainingError, match="take at most"):
        train(model, *rows, TrainSettings(tokens=10**6, row_length=32, rows_per_step=2), tmp_path)


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


def test_one_loss_curve_does_not_drift(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    """Golden: change it knowingly, and raise the version of training's code with it."""
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    settings = TrainSettings(tokens=8 * 64, row_length=32, rows_per_step=2, learning_rate=1e-2, clip_norm=0.5)
    losses = train(model, *rows, settings, tmp_path).losses
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=2e-4)


def test_autocast_is_used_and_parameters_stay_float32(tiny_llama: Any, rows: Any, tmp_path: Path) -> None:
    losses = []
    for autocast in (None, torch.bfloat16):
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        losses.append(train(model, *rows, SMALL, tmp_path / str(autocast), autocast=autocast).losses)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


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
