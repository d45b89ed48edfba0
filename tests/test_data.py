"""Data: what is read, what is refused and how, what is cut into tokens once, and that packing changes no loss."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kallm_bench.engine.data import rows_of
from kallm_bench.errors import DataError
from kallm_bench.files import DiskError
from kallm_bench.sharing import Shared
from kallm_bench.training import Forward, TrainSettings, find_data, prepare, rows, tokens
from kallm_bench.training.conversations import Conversation, DataSource
from kallm_bench.training.data import IGNORE, LEARN, Template
from kallm_bench.training.forward import batch_of
from kallm_bench.training.tokens import tokenised

CHAT = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4 🦆"},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "\n6, I think"},
    ],
    [{"role": "user", "content": "Say a word."}, {"role": "assistant", "content": "Wort. Слово. 言葉"}],
]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
CALLING = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
CALLS_SHOWN = (  # as Hermes and Qwen have it, in few words
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ call.function.arguments }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOKS_INSIDE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ 'Cheerfully: ' if 'Hello' in m.content }}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAYS_THE_DAY = "{{ strftime_now('%d %B %Y') }}\n" + LOOKS_INSIDE
TRIMS = LOOKS_INSIDE.replace("{{ m.content }}", "{{ m.content | trim }}").replace("Cheerfully: ", "")
REFUSES = (
    LOOKS_INSIDE + "{% if messages[0].role == 'system' %}{{ raise_exception('System role not\nsupported') }}{% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def write_chat(path: Path, conversations: list[Any]) -> str:
    import pyarrow
    import pyarrow.parquet

    entries = [{"messages": messages, "source": "test"} for messages in conversations]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path, row_group_size=50)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(entries, indent=1) if path.stem == "list" else lines)
    return str(path)


def learned(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[first:last] for first, last in spans]


# --- packing ----------------------------------------------------------------------------------------------------------


def alone_and_packed(model: Any, tokenizer: Any, conversations: list[Any], packed: Any) -> list[tuple[float, float]]:
    """The mean loss of each document that lies whole in a row: by itself, from its text; and in its row."""
    template, begin, losses = Template(tokenizer), 0, []
    row_length = packed.tokens.shape[1]
    for messages in conversations:
        text, spans = template.spans(messages)
        cut = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = cut["input_ids"]
        row, place = divmod(begin, row_length)
        begin += len(ids)
        if row >= len(packed) or place + len(ids) > row_length:
            continue
        bears = [any(first <= start < last for first, last in spans) for start, _ in cut["offset_mapping"]]
        mask = torch.tensor(bears[1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
            alone = F.cross_entropy(logits[mask], torch.tensor(ids[1:])[mask])
            batch = packed.batch([row])
            others = torch.ones_like(batch["targets"], dtype=torch.bool)
            others[:, place : place + len(ids)] = False
            targets = batch["targets"].masked_fill(others, IGNORE)
            with Forward(model) as forward:
                total, count = forward.loss_sum(batch_of(batch["input_ids"], batch["position_ids"], targets))
        assert count == int(mask.sum())
        losses.append((float(alone), float(total) / count))
    return losses


@pytest.mark.parametrize("row_length", [128, 300])
def test_a_document_has_the_same_loss_packed_and_alone(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, row_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(initializer_range=0.5)  # so that attention matters
    source = write_chat(tmp_path / "chat.jsonl", CHAT * 8)
    packed, _ = prepare(source, bundled_tokenizer, row_length, tmp_path / "cache", heldout=source)
    losses = alone_and_packed(model, bundled_tokenizer, CHAT * 8, packed)
    assert len(losses) >= 10
    assert max(abs(alone - together) for alone, together in losses) < 1e-4

    batch = rows.Rows.batch

    def unmasked(self: Any, numbers: Any, device: str = "cpu") -> Any:
        made = batch(self, numbers, device)
        return made | {"position_ids": torch.arange(row_length).expand_as(made["position_ids"])}

    monkeypatch.setattr(rows.Rows, "batch", unmasked)
    losses = alone_and_packed(model, bundled_tokenizer, CHAT * 8, packed)
    assert max(abs(alone - together) for alone, together in losses) > 1e-2  # it would have been seen


@pytest.mark.long
def test_a_real_document_has_the_same_loss_packed_and_alone_in_a_real_model(
    bundled: tuple[Any, Any], shared_data: Path, tmp_path: Path
) -> None:
    model, tokenizer = bundled
    source = str(shared_data / "data" / "chat" / "val.jsonl.gz")
    packed, _ = prepare(source, tokenizer, 512, tmp_path, heldout=source)
    conversations = [conversation.messages for conversation in find_data(source).read()][:40]
    losses = alone_and_packed(model, tokenizer, conversations, packed)
    assert len(losses) >= 20
    assert max(abs(alone - together) for alone, together in losses) < 1e-4


def test_rows_are_cut_out_of_the_spans_one_after_the_other() -> None:
    stream = np.arange(100, dtype=np.uint16)
    begins, ends = np.array([3, 20, 50]), np.array([10, 45, 52])
    cut = rows.Cut(stream, begins, ends, 7)
    whole = np.concatenate([stream[begin:end] for begin, end in zip(begins, ends, strict=True)])[: 4 * 7].reshape(4, 7)
    assert cut.shape == (4, 7)
    assert np.array_equal(cut[:], whole)
    assert np.array_equal(cut[[3, 0, 3]], whole[[3, 0, 3]])
    assert np.array_equal(cut[2], whole[2])
    assert np.array_equal(np.stack(list(cut)), whole)
    for wrong in (4, -1, [0, 4]):
        with pytest.raises(IndexError):
            cut[wrong]


def test_every_conversation_is_trained_on_or_held_out_and_none_is_both(bundled_tokenizer: Any, tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": f"number {n}!"}] for n in range(120)]
    source = write_chat(tmp_path / "chat.jsonl", chat)
    parts = prepare(source, bundled_tokenizer, 2, tmp_path / "cache")
    said = [bundled_tokenizer.decode(part.tokens[:].reshape(-1)) for part in parts]
    for number in range(120):
        assert [f"number {number}!" in text for text in said] == [number % 50 != 0, number % 50 == 0]


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_call_of_a_tool_is_learned_and_its_answer_is_not(bundled_tokenizer: Any, tmp_path: Path) -> None:
    numbered = [{**CALLING[1], "tool_calls": [{**CALL, "id": "1"}]}, CALLING[2]]
    source = write_chat(tmp_path / "chat.parquet", [CALLING, CHAT[0], [CALLING[0], *numbered]])
    tokenizer = with_template(bundled_tokenizer, CALLS_SHOWN)
    called, plain, _ = find_data(source).read()
    assert "tool_calls" not in plain.messages[1]  # empty in the table, because others have some
    assert called.messages[1]["tool_calls"] == [CALL]  # and here the id
    text, spans = Template(tokenizer).spans(called.messages, [TOOL])
    assert "Adds." in text
    assert learned(text, spans) == ['<call>add {"a": 2, "b": 2}</call><|im_end|>', "It is 4.<|im_end|>"]
    packed, _ = prepare(source, tokenizer, 64, tmp_path / "cache", heldout=source)
    batch = packed.batch([0])
    bears = batch["targets"] != IGNORE
    assert tokenizer.decode(batch["targets"][bears]).startswith('<call>add {"a": 2, "b": 2}</call><|im_end|>It is 4.')


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LOOKS_INSIDE, ["Cheerfully: Hello, how are you?<|im_end|>"]),
        (TRIMS, ["4 🦆<|im_end|>", "6, I think<|im_end|>"]),
        (SAYS_THE_DAY, ["4 🦆<|im_end|>", "\n6, I think<|im_end|>"]),
    ],
)
def test_templates_that_do_more_than_put_words_together(
    bundled_tokenizer: Any, template: str, expected: list[str]
) -> None:
    found = Template(with_template(bundled_tokenizer, template))
    text, spans = found.spans(CHAT[0] if "Cheer" in expected[0] else CHAT[1])
    assert [said.removeprefix("Cheerfully: ") for said in learned(text, spans)] == [
        said.removeprefix("Cheerfully: ") for said in expected
    ]
    assert text.startswith("26 July 2024\n") == (template == SAYS_THE_DAY)


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (None, CALLING, "chat.jsonl, line 1: .* leaves out the call of the tool 'add' in message 2"),
        (REFUSES, CHAT[1], "chat.jsonl, line 1: .* cannot render this conversation: System role not supported"),
        (LOOKS_INSIDE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), CALLING[2:], "message 1, of"),
        (
            LOOKS_INSIDE.replace("'Hello' in", "'think' in m.content or loop.last and '🦆' in"),
            CHAT[1],
            "message 3 otherwise",
        ),
        ("", CHAT[0], "no chat template"),
    ],
)
def test_what_a_template_cannot_do_is_said_with_the_line(
    bundled_tokenizer: Any, tmp_path: Path, template: str | None, messages: Any, told: str
) -> None:
    tokenizer = bundled_tokenizer if template is None else with_template(bundled_tokenizer, template)
    source = write_chat(tmp_path / "chat.jsonl", [messages])
    with pytest.raises(DataError, match=told) as error:
        prepare(source, tokenizer, 8, tmp_path / "cache", heldout=source)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_would_cut_short_or_pad_does_neither(bundled_tokenizer: Any, tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", CHAT * 5)
    short = copy.deepcopy(bundled_tokenizer)
    short.backend_tokenizer.enable_truncation(5)
    short.backend_tokenizer.enable_padding(length=200)
    found = [prepare(source, each, 16, tmp_path / "cache", heldout=source)[0] for each in (bundled_tokenizer, short)]
    assert np.array_equal(found[0].tokens[:], found[1].tokens[:])
    assert short.backend_tokenizer.truncation["max_length"] == 5


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat.jsonl.gz", "list.json", "lines.json", "chat.parquet"])
def test_the_same_conversations_in_any_file_are_the_same_rows(
    bundled_tokenizer: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kallm_bench.training.tables.AT_ONCE", 7)
    expected, found = (
        prepare(write_chat(tmp_path / each, CHAT * 40), bundled_tokenizer, 32, tmp_path / "cache")
        for each in ("chat.jsonl", name)
    )
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.tokens[:], other.tokens[:])
        assert np.array_equal(one.flags[:], other.flags[:])


@pytest.mark.parametrize("name", ["list.json", "chat.jsonl.gz", "chat.parquet"])
def test_training_data_are_no_heldout_data_under_another_name(
    bundled_tokenizer: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    learned, same, fewer = (
        write_chat(tmp_path / each, CHAT * count) for each, count in (("chat.jsonl", 40), (name, 40), ("own.jsonl", 39))
    )
    settings = TrainSettings(learned, same, row_length=32)
    with pytest.raises(DataError, match=f"{name}: the held-out data is the training data"):
        rows_of(settings, bundled_tokenizer, lambda done, total: None, Shared())
    rows_of(dataclasses.replace(settings, heldout=fewer), bundled_tokenizer, lambda done, total: None, Shared())


def test_content_in_parts_of_text_is_put_together(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    source = write_chat(tmp_path / "chat.jsonl", [[{"role": "user", "content": parts}]])
    assert [conversation.messages[0]["content"] for conversation in find_data(source).read()] == ["Good day"]


def test_a_hub_set_is_read_by_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        column = "texts" if config == "raw" else "messages"
        return datasets.Dataset.from_list([{column: messages, "id": 1} for messages in CHAT])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("kallm_bench.training.tables.hub_answers", lambda: True)
    found = [find_data(name) for name in ("someone/chat", "someone/chat:test", "someone/chat:all:test")]
    assert asked == [
        ("someone/chat", None, "train"),
        ("someone/chat", None, "test"),
        ("someone/chat", "all", "test"),
    ]
    assert found[1].label == "someone/chat:test"
    assert found[0].count() == 3
    conversations = list(found[0].read())
    assert [conversation.messages for conversation in conversations] == CHAT
    assert conversations[2].where == "someone/chat, row 3"
    with pytest.raises(DataError, match="no column 'messages'; it has 'texts', 'id'"):
        find_data("someone/chat:raw:train")
    with pytest.raises(DataError, match="too many parts; it is name, name:split or"):
        find_data("someone/chat:a:b:c")


def test_a_table_without_messages_names_its_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"conversations": [[]], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'messages'; it has 'conversations', 'id'\. Rename"):
        list(find_data(str(tmp_path / "a.parquet")).read())
    (tmp_path / "b.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"b\.parquet: no parquet file, or a damaged one"):
        list(find_data(str(tmp_path / "b.parquet")).read())


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"text": "x", "label": 1}, "it has 'text', 'label'"),
        (["x"], "it is a list"),
        ({"messages": "Hi"}, "'messages' is .*Hi"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "needs a 'role' and a 'content'"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "no role 'human'. There are: assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "needs a 'role' and a 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "both text"),
        ({"messages": CALLING, "tools": "{oops"}, "'tools': not JSON"),
        ({"messages": CALLING, "tools": [1]}, "must be a list of JSON schemas"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": ["add"]}]}, "'tool_calls' must be a list of"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "\ud83d"}]}]}, "half a character"),
    ],
)
@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 2"), ("list.json", "entry 2")])
def test_a_malformed_entry_is_named(tmp_path: Path, name: str, place: str, entry: Any, told: str) -> None:
    entries = [{"messages": CHAT[0]}, entry]
    text = json.dumps(entries) if name == "list.json" else "".join(json.dumps(each) + "\n" for each in entries)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}, {place}.*{told}"):
        list(find_data(str(tmp_path / name)).read())


def test_a_damaged_file_is_called_so(tmp_path: Path) -> None:
    source = Path(write_chat(tmp_path / "chat.jsonl.gz", CHAT * 40))
    source.write_bytes(source.read_bytes()[:-20])
    for use in (lambda data: list(data.read()), lambda data: data.count()):
        with pytest.raises(DataError, match=r"chat\.jsonl\.gz is damaged"):
            use(find_data(str(source)))


# --- the cache --------------------------------------------------------------------------------------------------------


def counted(conversations: list[Any], reads: list[int], fingerprint: str = "some") -> DataSource:
    def read() -> Iterator[Conversation]:
        reads.append(1)
        for number, messages in enumerate(conversations, 1):
            yield Conversation(f"line {number}", messages)

    return DataSource("test", fingerprint, read, lambda: len(conversations))


def test_neither_another_row_length_nor_another_part_is_cut_into_tokens_again(
    bundled_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_chat(tmp_path / "chat.jsonl", CHAT * 40)
    expected = prepare(source, bundled_tokenizer, 32, tmp_path / "other", heldout=source)[0]
    prepare(source, bundled_tokenizer, 16, tmp_path / "cache")
    monkeypatch.setattr(tokens, "_write", lambda *_: pytest.fail("cut again"))
    found = prepare(source, bundled_tokenizer, 32, tmp_path / "cache", heldout=source)[0]
    assert np.array_equal(found.tokens[:], expected.tokens[:])
    assert found.fingerprint == expected.fingerprint


def test_other_data_and_another_template_are_other_tokens(bundled_tokenizer: Any, tmp_path: Path) -> None:
    reads: list[int] = []
    tokenised(counted(CHAT, reads), bundled_tokenizer, tmp_path)
    tokenised(counted(CHAT, reads, "other"), bundled_tokenizer, tmp_path)
    tokenised(counted(CHAT, reads), with_template(bundled_tokenizer, LOOKS_INSIDE), tmp_path)
    other = copy.deepcopy(bundled_tokenizer)
    other.eos_token = "<|endoftext|>"  # a template may write it
    tokenised(counted(CHAT, reads), other, tmp_path)
    assert len(reads) == 4
    tokenised(counted(CHAT, reads), bundled_tokenizer, tmp_path)
    assert len(reads) == 4


@pytest.mark.parametrize("damaged", ["tokens", "flags", "starts", "note.json"])
@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_cache_that_is_not_whole_is_made_again(
    bundled_tokenizer: Any, tmp_path: Path, damaged: str, harm: str
) -> None:
    reads: list[int] = []
    whole = tokenised(counted(CHAT, reads), bundled_tokenizer, tmp_path)
    expected = whole.tokens.tolist(), whole.flags.tolist(), whole.starts.tolist()
    (file,) = tmp_path.glob(f"tokens/*/{damaged}")
    if harm == "gone":
        file.unlink()
    else:
        content = file.read_bytes()
        file.unlink()  # rather than cut short under a map
        file.write_bytes(content[:-1])
    again = tokenised(counted(CHAT, reads), bundled_tokenizer, tmp_path)
    assert (again.tokens.tolist(), again.flags.tolist(), again.starts.tolist()) == expected
    assert len(reads) == 2


def test_of_two_that_want_the_same_data_one_works_and_the_other_waits(bundled_tokenizer: Any, tmp_path: Path) -> None:
    reads: list[int] = []
    inside, waited, go_on = threading.Event(), threading.Event(), threading.Event()
    found = []

    def hold(done: int, total: int) -> None:
        inside.set()
        assert go_on.wait(60)

    def wait(done: int, total: int) -> None:
        if total == 0:
            waited.set()
            go_on.set()

    def first() -> None:
        found.append(tokenised(counted(CHAT, reads), bundled_tokenizer, tmp_path, hold))

    worker = threading.Thread(target=first)
    worker.start()
    assert inside.wait(60)
    found.append(tokenised(counted(CHAT, reads), bundled_tokenizer, tmp_path, wait))
    worker.join()
    assert waited.is_set()
    assert len(reads) == 1
    assert found[0].tokens.tolist() == found[1].tokens.tolist()


@pytest.mark.long
def test_a_killed_process_leaves_nothing_that_is_read(bundled_tokenizer: Any, tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", CHAT * 400)
    script = (
        "import sys, time; from pathlib import Path; from transformers import AutoTokenizer\n"
        "from kallm_bench.training import prepare\n"
        "def stop(done, total): print(done, flush=True); time.sleep(60)\n"
        "prepare(sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), 32, Path(sys.argv[3]), progress=stop)"
    )
    bundled_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [sys.executable, "-c", script, source, str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) < 1200
        assert list((tmp_path / "cache").glob("tokens/.*.partial/tokens"))
        other.send_signal(signal.SIGKILL)
    whole, _ = prepare(source, bundled_tokenizer, 32, tmp_path / "cache")
    fresh, _ = prepare(source, bundled_tokenizer, 32, tmp_path / "fresh")
    assert np.array_equal(whole.tokens[:], fresh.tokens[:])
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_a_full_disk_is_told_and_leaves_nothing(bundled_tokenizer: Any, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk with so much left would answer
    try:
        with pytest.raises(DiskError, match="larger than allowed"):
            tokenised(counted(CHAT * 400, []), bundled_tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "tokens").iterdir())
    assert len(tokenised(counted(CHAT * 400, []), bundled_tokenizer, tmp_path)) == 1200


def test_conversations_are_written_as_they_come(bundled_tokenizer: Any, tmp_path: Path) -> None:
    """However many there are, a few thousand are in memory."""
    taken, most = [0], [0]

    def endless() -> Iterator[Conversation]:
        while True:
            taken[0] += 1
            yield Conversation("somewhere", CHAT[0])

    def stop(done: int, total: int) -> None:
        most[0] = max(most[0], taken[0] - done)
        if done > 4 * tokens.CONVERSATIONS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenised(DataSource("endless", "endless", endless, lambda: 0), bundled_tokenizer, tmp_path, stop)
    assert 0 < most[0] <= 2 * tokens.CONVERSATIONS
    assert not list((tmp_path / "tokens").iterdir())


def test_a_long_conversation_is_a_piece_by_itself(bundled_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHARACTERS", 300)
    pieces = list(
        tokens._pieces(iter([Conversation("", messages) for messages in CHAT * 3]), Template(bundled_tokenizer))
    )
    assert [len(piece) for piece in pieces] != [9]
    assert [text for piece in pieces for text, _ in piece] == [
        Template(bundled_tokenizer).spans(m)[0] for m in CHAT * 3
    ]


def test_flags_are_those_of_the_tokens_that_begin_in_a_turn(bundled_tokenizer: Any, tmp_path: Path) -> None:
    documents = tokenised(counted(CHAT, []), bundled_tokenizer, tmp_path)
    template = Template(bundled_tokenizer)
    for number, messages in enumerate(CHAT):
        text, spans = template.spans(messages)
        cut = bundled_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        part = slice(documents.starts[number], documents.starts[number + 1])
        assert documents.tokens[part].tolist() == cut["input_ids"]
        expected = [any(first <= begin < last for first, last in spans) for begin, _ in cut["offset_mapping"]]
        assert ((documents.flags[part] & LEARN) > 0).tolist() == expected
