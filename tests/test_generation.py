"""Replies of the generation engine: those of transformers' generate, whatever stands beside them."""

from __future__ import annotations

import copy
import dataclasses
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from kallm_bench.bbh import comparison, plain
from kallm_bench.bbh.attention import UnsupportedError
from kallm_bench.bbh.comparison import check
from kallm_bench.bbh.decoding import CPU_GRAIN, GRAINS, Decoder
from kallm_bench.bbh.generation import Reply, generate
from kallm_bench.bbh.prompts import Prompt, build_prompts
from kallm_bench.bbh.protocols import PROTOCOLS
from kallm_bench.bbh.questions import load_questions
from kallm_bench.bbh.shapes import layers_of, rows_that_fit
from kallm_bench.bbh.stops import Ending, Suspects
from kallm_bench.errors import BBHError
from kallm_bench.models import retrofit
from kallm_bench.models.spec import KANSpec

WORDS = 200
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": WORDS, "tie_word_embeddings": True}
BLOCK = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SHARED = "Q: Ada has 3 nuts and eats one. How many are left?\nA: Let's think step by step. Two are left.\n\n" * 3


def lively(model: Any) -> Any:
    """A random model that does not repeat its input: its logits are wide apart, and its attention matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                wide = 0.1 if "embed" in name or "wte" in name else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * wide)
    return model.eval()


COARSE = dataclasses.replace(GRAINS["cuda"], own=64, fixed_rows=16)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of so few words that a model's head costs next to nothing."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    texts = [prompt.shared + prompt.question for prompt in some_prompts()] + [string.printable]
    ends = ["<|endoftext|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=WORDS, special_tokens=ends, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=ends[0], pad_token=ends[0])


@pytest.fixture(scope="module")
def llama(tiny_llama: Any) -> Any:
    return lively(tiny_llama(num_hidden_layers=2, seed=5, vocab_size=WORDS))


def some_prompts(count: int = 9, most: int = 12, **changes: Any) -> list[Prompt]:
    """Of two tasks with few-shot texts and one without, of many lengths."""
    numbers = range(count)
    return [
        dataclasses.replace(
            Prompt(
                task=f"task{each % 3}",
                index=each,
                shared=("", SHARED, f"{SHARED}Q: Again?\nA: Yes.\n\n")[each % 3],
                question=f"Q: {'what about ' * (5 * each % 7)}{each} more?\nA:",
                max_new_tokens=most + each % 4,
            ),
            **changes,
        )
        for each in numbers
    ]


def by_generate(model: Any, tokenizer: Any, prompts: list[Prompt]) -> list[tuple[tuple[int, ...], str]]:
    """Tokens and reason of each, one prompt at a time."""
    found = []
    eos = model.generation_config.eos_token_id
    for prompt in prompts:
        ids = tokenizer(prompt.shared + prompt.question)["input_ids"]
        ending = Ending(frozenset([eos] if isinstance(eos, int) else eos or []), prompt.stops, prompt.max_new_tokens)
        [(tokens, why)] = plain.replies(model, tokenizer, [ids], [ending])
        found.append((tuple(tokens), why))
    return found


def ask(model: Any, tokenizer: Any, prompts: list[Prompt], **settings: Any) -> list[Reply]:
    replies = list(generate(model, tokenizer, prompts, **settings))
    assert sorted(reply.number for reply in replies) == list(range(len(prompts)))
    return sorted(replies, key=lambda reply: reply.number)


@pytest.fixture(scope="module")
def truth(llama: Any, tokenizer: Any) -> list[tuple[tuple[int, ...], str]]:
    found = by_generate(llama, tokenizer, some_prompts())
    assert len({tokens for tokens, _ in found}) == len(found)
    assert all(len(set(tokens)) > 3 for tokens, _ in found)
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
@pytest.mark.parametrize("grain", [CPU_GRAIN, COARSE], ids=["fine", "coarse"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_replies_are_those_of_generate(
    llama: Any, tokenizer: Any, truth: Any, batch_size: int, grain: Any, batch_invariant: bool
) -> None:
    notes = []
    replies = ask(
        llama,
        tokenizer,
        some_prompts(),
        batch_size=batch_size,
        batch_invariant=batch_invariant,
        grain=grain,
        watch=lambda work, done, total, note="": notes.append((done, total, note)),
    )
    assert [(reply.tokens, reply.why) for reply in replies] == truth
    assert [reply.shared_tokens > 0 for reply in replies] == [False, True, True] * 3
    assert [done for done, _, _ in notes] == list(range(1, 10))
    assert all(total == 9 and note.endswith("tokens/s") for _, total, note in notes)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
def test_in_batch_invariant_mode_logits_are_the_same_to_the_bit(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Not only the tokens: every logit of every reply, whatever else is asked."""
    prompts = some_prompts(20, most=6)
    prompts[0] = dataclasses.replace(prompts[0], question="so " * 150)  # needs more columns than the others
    seen: dict[int, set[bytes]] = {}
    original = Decoder.logits

    def spying(self: Decoder, rows: int, columns: int) -> torch.Tensor:
        found = original(self, rows, columns)
        for at in range(rows):
            seen.setdefault(hash((int(self.before[at]), int(self.positions[at]), int(self.tokens[at]))), set()).add(
                found[at].numpy().tobytes()
            )
        return found

    monkeypatch.setattr(Decoder, "logits", spying)
    settings = {"batch_size": batch_size, "batch_invariant": True}
    replies = ask(llama, tokenizer, prompts, **settings)
    whole = dict(seen)
    seen.clear()
    some = ask(llama, tokenizer, prompts[7:9], batch_size=3, batch_invariant=True)
    assert [reply.tokens for reply in some] == [reply.tokens for reply in replies[7:9]]
    for reply, prompt in zip(some, prompts[7:9], strict=True):
        ids = tokenizer(prompt.shared + prompt.question)["input_ids"]
        for at, token in enumerate((ids[-1], *reply.tokens[:-1])):
            key = hash((reply.shared_tokens, reply.prompt_tokens - reply.shared_tokens - 1 + at, token))
            assert seen[key] & whole[key]


def test_rows_are_refilled_and_moved_together(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short replies make room for others; at the end few rows are left, and steps are as small."""
    prompts = [dataclasses.replace(each, max_new_tokens=(3, 25)[each.index % 5 == 0]) for each in some_prompts(15)]
    rows, admitted = [], []
    steps, admit = Decoder.steps, Decoder.admit
    monkeypatch.setattr(Decoder, "steps", lambda self, *a: rows.append(a[1]) or steps(self, *a))
    monkeypatch.setattr(Decoder, "admit", lambda self, new: admitted.append(len(new)) or admit(self, new))
    replies = ask(llama, tokenizer, prompts, batch_size=4)
    assert [(reply.tokens, reply.why) for reply in replies] == by_generate(llama, tokenizer, prompts)
    assert sum(admitted) == 2 + 15  # two in the comparison at the start
    assert {1, 2, 4} <= set(rows)
    assert max(rows) == 4


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_ends_a_reply(llama: Any, tokenizer: Any, truth: Any, batch_invariant: bool) -> None:
    """The end-of-sequence token, a stop over several tokens, and the length: the same as where generate ends."""
    text = tokenizer.decode(truth[0][0])
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 3]
    special = truth[4][0][5]
    model = llama
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [special, 2]
    try:
        prompts = some_prompts(stops=(stop, "never there"))
        expected = by_generate(model, tokenizer, prompts)
        replies = ask(model, tokenizer, prompts, batch_size=5, batch_invariant=batch_invariant)
    finally:
        model.generation_config.eos_token_id = before
    assert [(reply.tokens, reply.why) for reply in replies] == expected
    assert {reply.why for reply in replies} == {"eos", "stop", "length"}
    assert replies[0].text == text[: text.index(stop)]
    assert replies[4].tokens[-1] == special


@pytest.mark.parametrize(
    ("said", "stops", "most", "tokens", "why", "text"),
    [
        ("one two\n\nthree", ("\n\n",), 99, "one two\n\n", "stop", "one two"),
        ("one two Q: three", ("</s>", "Q:"), 99, "one two Q:", "stop", "one two "),
        ("one<|im_end|>two", ("<|im_end|>",), 99, "one<|im_end|>", "stop", "one"),  # a special token, by its text
        ("one two three", (" thr", "two"), 99, "one two", "stop", "one "),  # the first that is complete
        ("a b c d e f", (), 3, "a b c", "length", "a b c"),
        ("a b c d e f", ("c",), 3, "a b c", "stop", "a b "),
        ("a b c d e f", ("d",), 3, "a b c", "length", "a b c"),  # beyond the end
        ("a b c<|endoftext|>", (), 2, "a b", "length", "a b"),
        ("one<|endoftext|>two", ("two",), 99, "one<|endoftext|>", "eos", "one"),
        ("né ☃ Qa", ("Q",), 99, "né ☃ Q", "stop", "né ☃ "),  # characters of several tokens
        ("a b", ("c",), 99, None, None, None),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 5, 50])
def test_endings(
    bundled_tokenizer: Any,
    said: str,
    stops: tuple[str, ...],
    most: int,
    tokens: str | None,
    why: str | None,
    text: str | None,
    chunk: int,
) -> None:
    """Looked at as tokens come, any number at a time."""
    ids = bundled_tokenizer(said)["input_ids"]
    ending = Ending(frozenset([bundled_tokenizer.convert_tokens_to_ids("<|endoftext|>")]), stops, most)
    end, seen = None, 0
    while end is None and seen < len(ids):
        end = ending.find(bundled_tokenizer, ids[: seen + chunk], seen)
        seen += chunk
    if tokens is None:
        assert end is None
        return
    assert end is not None
    assert bundled_tokenizer.decode(ids[: end[0]]).startswith(tokens)
    assert not bundled_tokenizer.decode(ids[: end[0] - 1]).startswith(tokens)
    assert end[1] == why
    assert ending.cut(bundled_tokenizer.decode(ids[: end[0]], skip_special_tokens=True)) == text


@pytest.mark.parametrize("stops", [(), ("Q:", "\n\n"), ("<|im_end|>",), ("ends ",), ("☃", "</s>"), ("né",)], ids=str)
def test_tokens_that_may_end_a_reply_are_those_that_do(bundled_tokenizer: Any, stops: tuple[str, ...]) -> None:
    """Of texts with all stops in them, cut anywhere, every token that ends one is suspected; most others are not."""
    said = "A long text ends here\n\nQ: né ☃ and</s> so<|im_end|> on, as it has always done. " * 2
    ids = bundled_tokenizer(said)["input_ids"]
    ending = Ending(frozenset([bundled_tokenizer.convert_tokens_to_ids("<|endoftext|>")]), stops, 999)
    suspects = Suspects(bundled_tokenizer, [ending, ending], len(bundled_tokenizer))
    found = suspects.among(np.array([ids, ids]))
    assert found.shape == (2, len(ids))
    assert (suspects.among(np.array([ids, ids])) == found).all()
    ended = []
    for start in range(len(ids)):
        end = ending.find(bundled_tokenizer, ids[start:], 0)
        if end is not None:
            ended.append(start + end[0] - 1)
    assert bool(ended) is bool(stops)
    assert all(found[0, at] for at in ended)
    if stops != ("ends ",):  # a space may be left out where a token begins, so that any token may end it
        assert found.mean() < 0.5
    ends = np.array([[0, *sorted(ending.tokens)]])
    assert suspects.among(ends)[0, 1]


def test_where_a_tokenizer_leaves_spaces_out_any_token_may_say_one() -> None:
    class Stripping:
        def decode(self, tokens: list[int], **settings: Any) -> str:
            return "".join(" a"[:token] for token in tokens).lstrip()

    ending = Ending(frozenset(), (". ",), 9)
    assert Suspects(Stripping(), [ending], 3).among(np.array([[1, 2]])).all()


def test_replies_without_suspects_are_not_decoded(
    llama: Any, tokenizer: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs nothing where no token can end a reply."""
    found, find = [], Ending.find
    monkeypatch.setattr(Ending, "find", lambda self, *given: found.append(given) or find(self, *given))
    replies = ask(llama, tokenizer, some_prompts(stops=("\0",)), batch_size=4)
    assert [(reply.tokens, reply.why) for reply in replies] == truth
    assert len(found) == len(truth)


def test_beginnings_of_several_tasks_at_once(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is computed once, and one step has rows of several."""
    begun, together = [], []
    begin, steps = Decoder.begin, Decoder.steps
    monkeypatch.setattr(Decoder, "begin", lambda self, at, ids: begun.append(len(ids)) or begin(self, at, ids))
    monkeypatch.setattr(
        Decoder, "steps", lambda self, *a: together.append(len(set(self.before[: a[1]].tolist()))) or steps(self, *a)
    )
    ask(llama, tokenizer, some_prompts(), batch_size=12)
    assert len(begun) == 1 + 2  # one in the comparison at the start
    assert max(together) == 3


def test_rows_that_are_free_look_at_nothing(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the others go on: on a GPU they would read their memory for nothing."""
    seen, steps = [], Decoder.steps

    def spying(self: Decoder, *given: Any) -> Any:
        found = steps(self, *given)
        seen.append((int(self.used.sum()), int((self.positions > 0).sum())))
        return found

    monkeypatch.setattr(Decoder, "steps", spying)
    prompts = some_prompts(4, shared="")
    prompts = [dataclasses.replace(each, max_new_tokens=(2, 20)[each.index == 1]) for each in prompts]
    ask(llama, tokenizer, prompts, batch_size=4)
    assert seen[0] == (4, 4)
    assert seen[-1] == (1, 1)


def test_places_of_beginnings_are_used_again(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all are in memory at once, the next waits until one is no longer needed."""
    places, begin = [], Decoder.begin
    monkeypatch.setattr(Decoder, "begin", lambda self, at, ids: places.append(at) or begin(self, at, ids))
    prompts = [
        dataclasses.replace(each, shared=f"{SHARED}Q: {'so ' * (each.index % 6)}?\nA: Yes.\n\n")
        for each in some_prompts(14)
    ]
    replies = ask(llama, tokenizer, prompts, batch_size=8)
    assert [(reply.tokens, reply.why) for reply in replies] == by_generate(llama, tokenizer, prompts)
    assert len(places) == 1 + 6
    assert set(places) == {0, 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_on_a_gpu_steps_are_recorded_and_attend_by_the_kernels(
    llama: Any, tokenizer: Any, truth: Any, monkeypatch: pytest.MonkeyPatch, batch_invariant: bool
) -> None:
    """Each number of rows once; with the replies that a CPU gives."""
    model = copy.deepcopy(llama).cuda()
    recorded: list[tuple[bool, bool]] = []
    record = Decoder._record

    def spying(self: Decoder, rows: int) -> None:
        record(self, rows)
        recorded.append((self.fused, rows in self._graphs))

    monkeypatch.setattr(Decoder, "_record", spying)
    notes: list[str] = []
    for batch_size in (None, 2, 9):
        settings = {"batch_size": batch_size, "batch_invariant": batch_invariant}
        replies = ask(model, tokenizer, some_prompts(), **settings, watch=lambda *all: notes.append(all[3]))
        assert [(reply.tokens, reply.why) for reply in replies] == truth
    assert all(note.endswith("tokens/s") for note in notes), notes
    assert recorded == [(True, True)] * 3


def test_rows_follow_from_memory_where_nobody_says(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of(llama, 100)
    assert sum(layer.token_bytes for layer in layers) == 2 * 2 * (8 + 8) * 4
    assert rows_that_fit(torch.device("cpu"), layers, 100) == 16
    gpu, row = torch.device("cuda"), 100 * 2 * 2 * (8 + 8) * 4
    for fits, rows in ((0.5, 1), (37.2, 37), (5000, 1024)):
        free = int(fits * row / 0.6)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free // 4, 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, free=free: free)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, free=free: free // 4)
        assert rows_that_fit(gpu, layers, 100) == rows


def test_a_prompt_beyond_the_context_is_cut_from_the_left_and_said(llama: Any, tokenizer: Any) -> None:
    notes = []
    prompts = some_prompts(4)
    prompts[1] = dataclasses.replace(prompts[1], question="again and " * 500 + "again?")
    ids = tokenizer(prompts[1].shared + prompts[1].question)["input_ids"]
    room = 512 - prompts[1].max_new_tokens
    replies = ask(llama, tokenizer, prompts, batch_size=4, watch=lambda *all: notes.append(all[3]))
    assert [reply.cut_tokens for reply in replies] == [0, len(ids) - room, 0, 0]
    assert replies[1].prompt_tokens == room
    assert notes[0] == "1 prompts cut from the left to fit the context of 512 tokens"
    end = Ending(frozenset(), (), prompts[1].max_new_tokens)
    assert list(replies[1].tokens) == plain.replies(llama, tokenizer, [ids[-room:]], [end])[0][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared": "", "question": ""}, "empty"),
        ({"max_new_tokens": 512}, "512 new tokens"),
        ({"max_new_tokens": 0}, "0 new"),
    ],
)
def test_what_cannot_be_asked_is_refused(llama: Any, tokenizer: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BBHError, match=words):
        list(generate(llama, tokenizer, some_prompts(1, **changes), batch_size=1))


def test_no_prompts_no_replies(llama: Any, tokenizer: Any) -> None:
    assert list(generate(llama, tokenizer, [], batch_size=1)) == []


@pytest.mark.parametrize("where", ["decoder", "generate"])
def test_where_memory_runs_out_the_batch_halves_and_goes_on(
    llama: Any, tokenizer: Any, truth: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A model that has no room for more than two replies, once some of them are there."""
    notes: list[str] = []
    forward, calls = type(llama).forward, []

    def small(self: Any, input_ids: Any = None, **others: Any) -> Any:
        calls.append(len(input_ids))
        if len(calls) > 12 and len(input_ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(type(llama), "forward", small)
    if where == "generate":
        monkeypatch.setattr(comparison, "TOLERANCE", {torch.float32: -1.0})
    replies = ask(llama, tokenizer, some_prompts(), batch_size=8, watch=lambda *all: notes.append(all[3]))
    assert [(reply.tokens, reply.why) for reply in replies] == truth
    assert [note for note in notes if "memory" in note] == [f"out of memory, {n} at once from here" for n in (4, 2)]
    assert any("generate" in note for note in notes) is (where == "generate")

    monkeypatch.setattr(type(llama), "forward", lambda *a, **b: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        ask(llama, tokenizer, some_prompts(), batch_size=8)


def test_generation_settings_of_a_model_have_no_say_and_stay(
    llama: Any, tokenizer: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = llama.generation_config
    monkeypatch.setattr(shipped, "repetition_penalty", 3.0)
    monkeypatch.setattr(shipped, "do_sample", True)
    attention = llama.config._attn_implementation
    for tolerance in (3e-3, -1.0):  # by the engine, by generate
        monkeypatch.setattr(comparison, "TOLERANCE", {torch.float32: tolerance})
        replies = ask(llama, tokenizer, some_prompts(), batch_size=3)
        assert [(reply.tokens, reply.why) for reply in replies] == truth
    assert llama.generation_config is shipped
    assert shipped.repetition_penalty == 3.0
    assert llama.config._attn_implementation == attention


CONFIGURATIONS = {
    "qwen3": (Qwen3Config(**SMALL, **BLOCK, head_dim=8), True),
    "gpt-neox": (GPTNeoXConfig(**SMALL, intermediate_size=64, num_attention_heads=4), True),
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS), True),
    "wide window": (MistralConfig(**SMALL, **BLOCK, sliding_window=400), True),
    "narrow window": (MistralConfig(**SMALL, **BLOCK, sliding_window=20), False),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_other_architectures(name: str, batch_invariant: bool, tokenizer: Any) -> None:
    """By the engine where it does what they do, by generate where it does not."""
    config, known = CONFIGURATIONS[name]
    config.eos_token_id, config.bos_token_id, config.pad_token_id = 2, 1, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = lively(AutoModelForCausalLM.from_config(config))
    notes: list[str] = []
    prompts = some_prompts(6, most=8)
    settings = {"batch_size": 4, "batch_invariant": batch_invariant, "watch": lambda *all: notes.append(all[3])}
    replies = ask(model, tokenizer, prompts, **settings)
    assert [(reply.tokens, reply.why) for reply in replies] == by_generate(model, tokenizer, prompts)
    assert ("generate" not in notes[0]) is known, notes[0]


def test_a_retrofitted_model_is_asked_like_any_other(tiny_llama: Any, tokenizer: Any) -> None:
    model = lively(tiny_llama(num_hidden_layers=2, seed=5, vocab_size=WORDS))
    retrofit(model, KANSpec("1", "cheby2"))
    replies = ask(model, tokenizer, some_prompts(6), batch_size=4)
    found = by_generate(model, tokenizer, some_prompts(6))
    assert [(reply.tokens, reply.why) for reply in replies] == found


def test_attention_that_is_wrong_is_noticed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at the start sees a wrong token, and a place that is off by one."""
    layers = layers_of(llama, 100)
    check(llama, layers, CPU_GRAIN, fused=False)
    begin, admit = Decoder.begin, Decoder.admit
    monkeypatch.setattr(Decoder, "begin", lambda self, place, ids: begin(self, place, [*ids[:-1], ids[0]]))
    with pytest.raises(UnsupportedError, match="differ by"):
        check(llama, layers, CPU_GRAIN, fused=False)
    monkeypatch.setattr(Decoder, "begin", begin)

    def late(self: Decoder, prompts: Any) -> None:
        admit(self, prompts)
        with torch.inference_mode():
            self.positions += 1

    monkeypatch.setattr(Decoder, "admit", late)
    with pytest.raises(UnsupportedError, match="differ by"):
        check(llama, layers, CPU_GRAIN, fused=False)


@pytest.mark.long
def test_replies_of_the_bundled_model_to_real_questions(bundled: Any, shared_data: Path) -> None:
    """Few-shot chains of thought: the same tokens as generate's, one prompt at a time, and in either mode."""
    model, tokenizer = bundled
    questions = load_questions(str(shared_data / "data/bbh"), tasks=["navigate", "object_counting", "snarks"], limit=4)
    prompts = build_prompts(questions, PROTOCOLS["cot-fewshot"], None, "lm-eval", 48)
    expected = by_generate(model, tokenizer, prompts)
    for settings in ({"batch_size": 8}, {"batch_size": 8, "batch_invariant": True}, {"batch_size": 2}):
        replies = ask(model, tokenizer, prompts, **settings)
        assert [(reply.tokens, reply.why) for reply in replies] == expected
    assert all(reply.shared_tokens > 400 for reply in replies)
