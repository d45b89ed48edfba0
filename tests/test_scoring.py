"""Log-likelihoods of choices are those of the plain way, whatever is shared, packed, stopped or too long."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from kallm_bench.bbh.encoding import Encoder
from kallm_bench.bbh.prompts import Prompt, build_prompts
from kallm_bench.bbh.protocols import PROTOCOLS
from kallm_bench.bbh.questions import load_questions
from kallm_bench.bbh.scoring import ChoiceScores, count_tokens, score_choices
from kallm_bench.bbh.trees import branches_of
from kallm_bench.errors import BBHError

SHOTS = "Say which.Q: Is one more than two?\nA: No\n\nQ: Is two more than one?\nA: Yes\n\n"
COUNTS = tuple(map(str, range(12)))


def make_prompts(words: int = 6) -> list[Prompt]:
    """Eleven questions of three tasks: choices of one token and of several, some that share their first ones."""
    some = ["red", "green", "blue", "many,", "few", "of", "12", "1997;", "a", "(X)", "her", "own:", "able\nto"] * words
    yes_no = [Prompt("navigate", i, SHOTS, f"Q: {' '.join(some[: i + 2])}?\nA:", ("Yes", "No"), "No") for i in range(6)]
    counted = [
        Prompt("object_counting", i, "", f"Q: I have {i} {' '.join(some[i : 2 * i + words])}\nA:", COUNTS, "3")
        for i in (0, 2, 4)
    ]
    lettered = [
        Prompt("snarks", i, SHOTS, f"Q: {some[i]} {some[i + 3]}\nA: \n", ("(A)", "(B)", "(A) or (B)"), gold)
        for i, gold in ((3, "(B)"), (5, "(E)"))
    ]
    return [*yes_no, *counted, *lettered]


@torch.no_grad()
def plainly(model: Any, tokenizer: Any, prompts: list[Prompt], context: int) -> dict[tuple[str, int], list[float]]:
    """The log-likelihoods as lm-eval defines them, each choice by itself, in the model's dtype."""
    found = {}
    for prompt in prompts:
        text = prompt.shared + prompt.question
        before = len(tokenizer.encode(text.rstrip()))
        values = []
        for choice in prompt.choices:
            tokens = tokenizer.encode(f"{text} {choice}")
            length = len(tokens) - before
            tokens = torch.tensor(tokens[-context - 1 :])
            likelihoods = model(input_ids=tokens[None, :-1]).logits[0, -length:].log_softmax(-1)
            values.append(likelihoods.gather(1, tokens[-length:, None]).sum().item())
        found[prompt.task, prompt.index] = values
    return found


def leaderboard(shared_data: Path, limit: int | None = None, tasks: tuple[str, ...] = ()) -> list[Prompt]:
    protocol = PROTOCOLS["leaderboard"]
    questions = load_questions(str(shared_data / "data/bbh"), tasks, limit, among=protocol.tasks)
    return build_prompts(questions, protocol)


def by_question(scores: Any) -> dict[tuple[str, int], ChoiceScores]:
    found = list(scores)
    assert len({(each.task, each.index) for each in found}) == len(found)
    return {(each.task, each.index): each for each in found}


def assert_equal(scores: dict[tuple[str, int], ChoiceScores], expected: dict[tuple[str, int], list[float]]) -> None:
    assert set(scores) == set(expected)
    for key, values in expected.items():
        assert scores[key].loglikelihoods == pytest.approx(values, abs=1e-4), key


@pytest.fixture(scope="module")
def llama(tiny_llama: Any) -> Any:
    """Two blocks, and weights so large that tokens far away matter."""
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=2048)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4)
    return model


@pytest.fixture(scope="module")
def expected(llama: Any, bundled_tokenizer: Any) -> dict[tuple[str, int], list[float]]:
    return plainly(llama, bundled_tokenizer, make_prompts(), 2048)


@pytest.mark.parametrize("slots", [1, 60, 2048])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_they_are_those_of_the_plain_way(
    llama: Any, bundled_tokenizer: Any, expected: Any, slots: int, attention: str
) -> None:
    """However many tokens go at once, and whichever way attention is computed."""
    told: list[str] = []
    llama.set_attn_implementation(attention)
    try:
        prompts = make_prompts()
        watch = lambda work, done, total, note="": told.append(note)  # noqa: E731
        scores = by_question(score_choices(llama, bundled_tokenizer, prompts, slots=slots, watch=watch))
    finally:
        llama.set_attn_implementation("sdpa")
    assert_equal(scores, expected)
    assert not any(told)
    forwarded = sum(each.forwarded_tokens for each in scores.values())
    assert forwarded < sum(len(bundled_tokenizer.encode(prompt.shared + prompt.question)) for prompt in prompts)


@pytest.mark.parametrize("context", [12, 40])
def test_what_does_not_fit_loses_its_beginning(tiny_llama: Any, bundled_tokenizer: Any, context: int) -> None:
    """Some prompts fit into 40 tokens and some do not; none fits into 12."""
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=context)
    prompts, told = make_prompts(), []
    watch = lambda work, done, total, note="": told.append(note)  # noqa: E731
    scores = by_question(score_choices(model, bundled_tokenizer, prompts, watch=watch))
    assert_equal(scores, plainly(model, bundled_tokenizer, prompts, context))
    cut = sum(each.left_out_tokens > 0 for each in scores.values())
    assert 0 < cut < len(prompts) if context == 40 else cut == len(prompts)
    assert f"{cut} prompts do not fit into {context} tokens of context; their beginnings are left out" in told


@torch.no_grad()
@pytest.mark.parametrize(("templated", "room"), [(True, 48), (False, 36)])
def test_answers_in_a_reply_s_place_follow_what_is_left_of_the_prompt_beside_the_reply(
    tiny_llama: Any, bundled_tokenizer: Any, templated: bool, room: int
) -> None:
    """Some prompts leave room for their reply and some lose their beginning; one answer alone will do."""
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=room + 12)
    end = "<|im_end|>\n<|im_start|>assistant\n" if templated else ""
    prompts = [
        dataclasses.replace(prompt, question=prompt.question + end, max_new_tokens=12, templated=templated)
        for prompt in make_prompts(3)
    ]
    prompts[-1] = dataclasses.replace(prompts[-1], choices=("(E)",))
    scores = by_question(score_choices(model, bundled_tokenizer, prompts))
    cut = 0
    for prompt in prompts:
        text = prompt.text if templated else prompt.text.rstrip()
        space = "" if templated else prompt.text[len(text) :] + " "
        before = bundled_tokenizer.encode(text)
        cut += len(before) > room
        values = []
        for choice in prompt.choices:
            tokens = bundled_tokenizer.encode(text + space + choice)[len(before) :]
            ids = torch.tensor([before[-room:] + tokens])
            likelihoods = model(input_ids=ids[:, :-1]).logits[0, -len(tokens) :].log_softmax(-1)
            values.append(likelihoods.gather(1, ids[0, -len(tokens) :, None]).sum().item())
        found = scores[prompt.task, prompt.index]
        assert found.loglikelihoods == pytest.approx(values, abs=1e-4)
        assert found.left_out_tokens == max(0, len(before) - room)
    assert 0 < cut < len(prompts)
    with pytest.raises(BBHError, match=f"60 new tokens; the model's context has {room + 12}"):
        list(score_choices(model, bundled_tokenizer, [dataclasses.replace(prompts[0], max_new_tokens=60)]))


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("llama", True), ("qwen2", True), ("gpt2", True), ("bloom", False), ("mistral", False), ("mamba", False)],
)
def test_a_model_that_cannot_share_is_asked_in_full(kind: str, shared: bool, bundled_tokenizer: Any) -> None:
    """No positions but by slot, windows shorter than a prompt, no keys at all: the same figures, from more tokens."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 49152, "num_attention_heads": 4}
    few_keys = {"intermediate_size": 48, "num_key_value_heads": 2}
    special: dict[str, dict[str, Any]] = {
        "llama": few_keys,
        "qwen2": few_keys,
        "mistral": {**few_keys, "sliding_window": 16},
        "mamba": {"state_size": 4, "intermediate_size": 64},
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**sizes | special.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name and value.ndim == 2:
                value.mul_(4)
    prompts, told = make_prompts(), []
    watch = lambda work, done, total, note="": told.append(note)  # noqa: E731
    scores = by_question(score_choices(model, bundled_tokenizer, prompts, watch=watch))
    assert_equal(scores, plainly(model, bundled_tokenizer, prompts, 2048))
    assert any("every choice is computed in full" in note for note in told) is not shared


def test_what_is_done_is_not_asked_again(llama: Any, bundled_tokenizer: Any) -> None:
    """A run that goes on gives what one in one go gives, to the bit, from no batch that was done."""
    prompts = make_prompts()
    whole = list(score_choices(llama, bundled_tokenizer, prompts, slots=60))
    for stopped in (1, 5, 10, 11):
        done = {(each.task, each.index) for each in whole[:stopped]}
        assert list(score_choices(llama, bundled_tokenizer, prompts, slots=60, done=done)) == whole[stopped:]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_together_are_the_whole(llama: Any, bundled_tokenizer: Any, parts: int) -> None:
    prompts = make_prompts()
    whole = by_question(score_choices(llama, bundled_tokenizer, prompts, slots=60))
    several = [list(score_choices(llama, bundled_tokenizer, prompts, slots=60, part=(i, parts))) for i in range(parts)]
    assert by_question(each for part in several for each in part) == whole
    assert sum(map(bool, several)) == min(parts, 3)


def test_batches_halve_where_memory_runs_out(
    llama: Any, bundled_tokenizer: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = llama.forward
    most, seen = 50, []

    def forgetful(*args: Any, input_ids: torch.Tensor, **named: Any) -> Any:
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("no more")
        seen.append(input_ids.numel())
        return forward(*args, input_ids=input_ids, **named)

    monkeypatch.setattr(llama, "forward", forgetful)
    told: list[str] = []
    watch = lambda work, done, total, note="": told.append(note)  # noqa: E731
    scores = by_question(score_choices(llama, bundled_tokenizer, make_prompts(), watch=watch))
    assert_equal(scores, expected)
    assert any(note.startswith("out of memory, ") for note in told)
    assert sum(each.forwarded_tokens for each in scores.values()) == sum(seen)
    most = 10
    with pytest.raises(BBHError, match="out of memory with the longest question, of"):
        list(score_choices(llama, bundled_tokenizer, make_prompts()))


@pytest.mark.parametrize("count", [1, 3])
def test_questions_that_are_the_same_have_something_of_their_own(
    llama: Any, bundled_tokenizer: Any, count: int
) -> None:
    """What they have in common is nearly all: the last token is left to each."""
    prompts = [Prompt("snarks", i, SHOTS, "Q: Which?\nA:", ("(A)", "(B)"), "(A)") for i in range(count)]
    told: list[str] = []
    watch = lambda work, done, total, note="": told.append(note)  # noqa: E731
    scores = by_question(score_choices(llama, bundled_tokenizer, prompts, watch=watch))
    assert_equal(scores, plainly(llama, bundled_tokenizer, prompts, 2048))
    assert not any(told)  # and they do share it


@pytest.mark.parametrize(("across", "cuts"), [("\nA", False), ("A\n", True)])
def test_a_vocabulary_that_joins_lines_is_not_cut_at_them(across: str, cuts: bool) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*"\nABQ: x", across])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(across[0], across[1])]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="x")
    encoder = Encoder(tokenizer)
    assert encoder.cuts_at_lines is cuts
    prompts = [Prompt("snarks", i, "B\n", f"A{'B' * i}\nA:", ("A", "B"), "A") for i in range(3)]
    for prompt, encoded in zip(prompts, encoder.encode(prompts), strict=True):
        assert list(encoded.context) == tokenizer.encode(prompt.shared + prompt.question)


@pytest.mark.parametrize("ending", ["\n<|im_end|>assistant\n", "\n### Answer:\n", "\n### Answer: ", "[/INST]"])
def test_behind_a_template_choices_are_cut_as_in_the_whole(bundled_tokenizer: Any, ending: str) -> None:
    """Also where it ends in no token of its own, so that nothing may be concluded from another prompt's end."""
    choices = ("Yes", "(A)", "12 34", "(A)")
    questions = ("Is it?", "A longer one, is it", "Is", "x\n", "<|im_end|>")
    prompts = [Prompt("snarks", i, "", f"{q}{ending}", choices, templated=True) for i, q in enumerate(questions)]
    for prompt, encoded in zip(prompts, Encoder(bundled_tokenizer).encode(prompts), strict=True):
        alone = bundled_tokenizer.encode(prompt.text)
        assert list(encoded.context) == alone
        for choice, continuation in zip(choices, encoded.continuations, strict=True):
            whole = bundled_tokenizer.encode(prompt.text + choice)
            parted = [*alone, *bundled_tokenizer.encode(choice)]
            assert list(encoded.context + continuation) == (whole if whole[: len(alone)] == alone else parted)


def test_a_reply_joins_no_token_of_its_prompt() -> None:
    """Where a tokenizer would make one token of the prompt's last and the choice's first; in another prompt it does
    not, and that one's choices are others' here, for this tokenizer begins a text with a space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*"\nABQ:▁x", "\nA"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\n", "A")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="x")
    prompts = [Prompt("snarks", i, "", text, ("A", "B"), templated=True) for i, text in enumerate(("Q:", "Q:\n"))]
    parted, joining = Encoder(tokenizer).encode(prompts)
    of = vocabulary.__getitem__
    assert tokenizer.encode("Q:\nA") == [of("▁"), of("Q"), of(":"), of("\nA")]
    assert joining.context == (of("▁"), of("Q"), of(":"), of("\n"))
    assert parted.continuations == ((of("A"),), (of("B"),))
    assert joining.continuations == ((of("▁"), of("A")), (of("▁"), of("B")))


def test_branches_share_what_choices_share() -> None:
    branches = branches_of(((7, 1, 9), (7, 2, 9), (5,), (7, 1, 3, 4)))
    assert branches.tokens == (7, 1, 3, 2)
    assert branches.depths == (1, 2, 3, 2)
    assert branches.ends == (4, 3, 3, 4)
    assert branches.paths == ((-1, 0, 1), (-1, 0, 3), (-1,), (-1, 0, 1, 2))


@pytest.mark.parametrize("border", ["\n", " ", ""])
def test_tokens_are_those_of_the_whole(bundled_tokenizer: Any, border: str) -> None:
    """Also where what is shared does not end between two tokens."""
    endings = ("one.Q: two", "onetime", "\n\nQ: x")
    shared = f"Some words{border}"
    prompts = [Prompt("snarks", i, shared, f"{end}\nA:", ("(A)", "(B)"), "(A)") for i, end in enumerate(endings)]
    for prompt, encoded in zip(prompts, Encoder(bundled_tokenizer).encode(prompts), strict=True):
        text = prompt.shared + prompt.question
        assert list(encoded.context) == bundled_tokenizer.encode(text)
        for choice, continuation in zip(prompt.choices, encoded.continuations, strict=True):
            assert list(encoded.context + continuation) == bundled_tokenizer.encode(f"{text} {choice}")


def test_the_leaderboard_takes_few_tokens(bundled_tokenizer: Any, shared_data: Path) -> None:
    """lm-eval puts 14.35 million through the model for the same questions."""
    prompts = leaderboard(shared_data)
    assert len(prompts) == 5761
    needed = count_tokens(bundled_tokenizer, prompts, 8192)
    assert needed.total < 700_000
    assert needed.questions > 500_000
    few = leaderboard(shared_data, 20, ("geometric_shapes", "hyperbaton"))
    encoder = Encoder(bundled_tokenizer)
    for task in ("geometric_shapes", "hyperbaton"):
        asked = [prompt for prompt in few if prompt.task == task]
        for prompt, encoded in zip(asked, encoder.encode(asked), strict=True):
            assert list(encoded.context) == bundled_tokenizer.encode(prompt.shared + prompt.question)


def test_the_counter_counts_what_the_model_sees(
    llama: Any, bundled_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = llama.forward

    def counting(*args: Any, input_ids: torch.Tensor, **named: Any) -> Any:
        seen.append(input_ids.numel())
        return forward(*args, input_ids=input_ids, **named)

    monkeypatch.setattr(llama, "forward", counting)
    scores = list(score_choices(llama, bundled_tokenizer, make_prompts(), slots=100))
    assert sum(each.forwarded_tokens for each in scores) == sum(seen)
    alone, both = seen[0], seen[0] + sum(seen[1:2])  # the batch that is tried both ways
    assert alone < both < 200
    assert count_tokens(bundled_tokenizer, make_prompts(), 2048, slots=100).total == sum(seen[2:])
