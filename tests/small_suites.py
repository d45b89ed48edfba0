"""A suite as it ships, with all its arms, for a model of width 32 and budgets of seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from kallm_bench.suites import Cell, Suite

SMALL_MODEL = {"num_hidden_layers": 30, "intermediate_size": 1536, "max_position_embeddings": 8192}
"""For tiny_llama: suites name blocks and hidden units of the bundled model, and worked examples are long."""

TURNS = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two, three, and so on. " * 8}]
TOPICS = ("the World Cup", "a flood in the north", "rising prices", "a new telescope")


def write_texts(folder: Path) -> None:
    """Writes conversations and texts with labels, each in a file to learn from and one that is held out."""
    for part, count in (("train", 300), ("heldout", 40)):
        told = [{**TURNS[0], "content": f"Count to {number} in {part}"} for number in range(count)]
        lines = [json.dumps({"messages": [turn, TURNS[1]]}) for turn in told]
        (folder / f"chat-{part}.jsonl").write_text("\n".join(lines) + "\n")
        texts = [
            {"text": f"News {number} of {TOPICS[number % 4]} ({part})", "label": number % 4} for number in range(count)
        ]
        (folder / f"news-{part}.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")


def small(suite: Suite, folder: Path, questions: Path | None = None) -> Suite:
    """The suite for the model in `folder`/base, with the texts of `write_texts` in `folder`; all else is its own.

    Args:
        questions: a folder of BIG-Bench Hard; None asks procedural ones, and by no protocol with worked examples.
    """
    return dataclasses.replace(suite, cells=tuple(_small(cell, folder, questions) for cell in suite.cells))


def _small(cell: Cell, folder: Path, questions: Path | None) -> Cell:
    kind = "news" if cell.train.task == "classify" else "chat"
    data, heldout = (str(folder / f"{kind}-{part}.jsonl") for part in ("train", "heldout"))
    train = dataclasses.replace(
        cell.train, data=data, heldout=heldout, tokens=min(cell.train.tokens, 256), row_length=32, rows_per_step=2,
        heldout_rows=2,
    )  # fmt: skip
    calibration = dataclasses.replace(
        cell.calibration, data=str(folder / "chat-train.jsonl"), heldout=str(folder / "chat-heldout.jsonl"),
        tokens=4096, heldout_tokens=256, row_length=64,
    )  # fmt: skip
    return dataclasses.replace(
        cell,
        model=str(folder / "base"),
        spec=cell.spec and dataclasses.replace(cell.spec, start_steps=min(cell.spec.start_steps, 4)),
        match=cell.match and dataclasses.replace(cell.match, start_steps=min(cell.match.start_steps, 4)),
        cut=dataclasses.replace(cell.cut, data=cell.cut.data and data),
        calibration=calibration,
        train=train,
        profile=dataclasses.replace(cell.profile, batch=1, length=32, new_tokens=4, repeats=2),
        evals=tuple(
            dataclasses.replace(each, source=str(questions or "procedural"), tasks=("boolean_expressions",), limit=2)
            for each in cell.evals
            if questions or each.protocol != "leaderboard"
        ),
        after=cell.after and _small(cell.after, folder, questions),
    )
