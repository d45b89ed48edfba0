"""Classification: a head for classes in the place of a model's head for tokens, and how often it is right.

To the training loop a class is a token of a very small vocabulary. So everything holds that holds for conversations:
the same steps, the same state, the same scopes; the head learns in every one of them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import CheckpointError, TrainingError
from kallm_bench.files import write_file
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import Metric
from kallm_bench.training.fit import Fit
from kallm_bench.training.forward import Forward
from kallm_bench.training.processes import ALONE, Processes, heard
from kallm_bench.training.scope import ClassHead
from kallm_bench.training.step import batches_of
from kallm_bench.training.texts import LabelledRows

CLASSIFIER = "classifier.json"
"""In a checkpoint's folder, beside the model's own head: the names of the classes, and the head for them."""


def put_head(model: PreTrainedModel, names: tuple[str, ...], seed: int, folder: Path | None = None) -> nn.Module:
    """Changes `model`: its head answers with a class for each position. Returns the head that it had.

    Args:
        names: of the classes.
        seed: of the start, where there is none to go on from.
        folder: of a checkpoint; its head is taken up where it is of the same classes.
    """
    own: nn.Module = model.get_output_embeddings()
    width = model.get_input_embeddings().weight.shape[1] if not isinstance(own, nn.Linear) else own.in_features
    head = ClassHead(width, len(names), device="cpu")
    found = read_head(folder) if folder else None
    with torch.no_grad():
        if found and found["names"] == list(names):
            head.weight.copy_(torch.tensor(found["weight"]))
            head.bias.copy_(torch.tensor(found["bias"]))
        else:
            generator = torch.Generator().manual_seed(seed)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
            head.bias.zero_()
    model.set_output_embeddings(head.to(model.device, model.dtype))
    return own


def read_head(folder: Path) -> dict[str, Any] | None:
    """Names, weight (C, H) and bias (C,) of the head in a checkpoint's folder; None where it has none."""
    path = folder / CLASSIFIER
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if len(found["names"]) != len(found["weight"]) or len(found["names"]) != len(found["bias"]):
            raise ValueError("it has more names than rows, or fewer")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return found


def write_head(folder: Path, head: nn.Linear, names: tuple[str, ...]) -> None:
    """Writes a head beside the model that it belongs to; float32 passes through JSON unchanged."""
    weight, bias = head.weight.float().cpu().tolist(), head.bias.float().cpu().tolist()
    content = json.dumps({"names": list(names), "weight": weight, "bias": bias})
    write_file(folder / CLASSIFIER, content.encode())


@dataclass(frozen=True)
class Answers:
    """What a model takes texts for.

    Args:
        names: of the classes.
        given, right: (N,) int64, the class given and the right one, text by text, in the data's order.
    """

    names: tuple[str, ...]
    given: np.ndarray
    right: np.ndarray

    def metrics(self) -> list[Metric]:
        """Accuracy with its interval, guessing, the most frequent class, and each class by itself."""
        hits = self.given == self.right
        counts = np.bincount(self.right, minlength=len(self.names))
        low, high = _interval(hits)
        metrics = [
            Metric("class_accuracy", float(hits.mean()), len(hits), note=f"95 % interval {low:.1%} to {high:.1%}"),
            Metric("guessing_accuracy", 1 / len(self.names), len(hits)),
            Metric("majority_accuracy", float(counts.max() / len(hits)), len(hits)),
        ]
        for number, name in enumerate(self.names):
            if counts[number]:
                metrics.append(
                    Metric(f"class_accuracy/{name}", float(hits[self.right == number].mean()), int(counts[number]))
                )
        return metrics

    def samples(self) -> list[dict[str, Any]]:
        """One a text, as of any evaluation."""
        return [
            {"task": "classify", "index": index, "extracted": self.names[given], "target": self.names[right],
             "correct": bool(given == right)}
            for index, (given, right) in enumerate(zip(self.given.tolist(), self.right.tolist(), strict=True))
        ]  # fmt: skip


def _interval(hits: np.ndarray) -> tuple[float, float]:
    """Wilson's."""
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    rows: LabelledRows,
    most: int,
    *,
    autocast: torch.dtype | None = None,
    batch_rows: int = 4,
    watch: Watch = nobody,
    processes: Processes = ALONE,
    sharded: bool = False,
) -> Answers:
    """What a model with a head for classes takes texts for: those in the first `most` rows.

    To be called by all processes.
    """
    rows = dataclasses.replace(rows, tokens=rows.tokens[:most], flags=rows.flags[:most], classes=rows.classes[:most])
    fit = Fit(batch_rows, watch, fixed=sharded)
    places = np.flatnonzero(rows.classes.ravel() >= 0)  # of the last tokens, text by text
    numbers = {int(place): number for number, place in enumerate(places)}
    length = rows.classes.shape[1]

    with Forward(model, autocast=autocast, split=not sharded) as forward:

        def work() -> Tensor:
            given = torch.zeros(len(places), dtype=torch.float64)
            batches = batches_of(forward, rows, np.arange(len(rows)), fit, processes)
            for done, batch in enumerate(batches, 1):
                row, column = np.divmod(batch.bearing.cpu().numpy(), length)
                texts = [numbers[int(place)] for place in np.asarray(batch.numbers)[row] * length + column]
                given[texts] = forward.logits(batch).argmax(1).double().cpu()
                watch("answers", done, len(batches))
            return given.to(model.device)

        with heard():
            given = fit.within(work)
    processes.sum([given])
    return Answers(rows.names, given.long().cpu().numpy(), rows.classes.ravel()[places])


def check_head(folder: Path, names: tuple[str, ...], name: str) -> None:
    """Asks for a head that can be measured as it is. TrainingError where a checkpoint has none of these classes."""
    found = read_head(folder)
    if found is None or found["names"] != list(names):
        what = "no head for classes" if found is None else f"a head for other classes, {found['names'][:8]}"
        raise TrainingError(f"{name} has {what}; train it first, with --tokens above 0")
