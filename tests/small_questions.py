"""A model and questions so small that a whole evaluation takes a moment; in files, for commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from kallm_bench.bbh.procedural import procedural_questions
from kallm_bench.bbh.tasks import TASKS
from kallm_bench.models import save_checkpoint

QUESTIONS = {"navigate": 9, "object_counting": 5, "web_of_lies": 7}


def make_small(tiny_llama: Any, folder: Path) -> None:
    """Writes `data`, a checkout of the repository with these questions, and `model`, whose replies differ."""
    write_questions(folder / "data")
    tokenizer = make_tokenizer([path.read_text() for path in sorted((folder / "data").glob("*/*"))])
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=2048, vocab_size=len(tokenizer))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4)
    save_checkpoint(folder / "model", model, tokenizer)


def write_questions(folder: Path) -> None:
    """A few questions of three tasks, and three worked ones of each."""
    (folder / "bbh").mkdir(parents=True)
    (folder / "cot-prompts").mkdir()
    for task, count in QUESTIONS.items():
        questions = procedural_questions(task, count + 3, seed=5)
        examples = [{"input": each.text, "target": each.target} for each in questions[3:]]
        (folder / "bbh" / f"{task}.json").write_text(json.dumps({"examples": examples}))
        worked = "".join(
            f"\n\nQ: {each.text}\nA: Let's think step by step.\nIt is so.\nSo the answer is {each.target}."
            for each in questions[:3]
        )
        (folder / "cot-prompts" / f"{task}.txt").write_text(f"Do not train.\n-----\n{TASKS[task].description}{worked}")


def make_tokenizer(texts: list[str], words: int = 400) -> Any:
    """Of so few words that loading it, and a model's head, cost next to nothing."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=words, special_tokens=["<|end|>"], initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
