"""What stages know of checkpoints: what one was made of, how large it is, and what its card says."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from kallm_bench.errors import CheckpointError, ModelError
from kallm_bench.filing import Bench, ModelRef, find_ref, parameter_count
from kallm_bench.models import read_lineage, replaced_modules, write_card
from kallm_bench.records import Metric, RunRecord
from kallm_bench.reporting import facts_of


def base_of(ref: ModelRef) -> ModelRef:
    """The model that a checkpoint was made of."""
    if not ref.lineage or "source" not in ref.base:
        raise ModelError(f"{ref.name} does not say what it was made of; pass --base")
    source = ref.base["source"]
    try:
        base = find_ref(source)
    except ModelError as error:
        raise ModelError(f"{ref.name} was made of '{source}', which is not here; pass --base") from error
    if base.fingerprint != ref.base.get("fingerprint"):
        raise CheckpointError(f"'{source}' is not what {ref.name} was made of any more; pass --base")
    return base


def describe_checkpoint(bench: Bench, folder: Path | None, model: PreTrainedModel, record: RunRecord) -> None:
    """Writes what is known of a checkpoint into its card, where it is one of ours."""
    if folder is None or not (lineage := read_lineage(folder)):
        return
    led = {entry["id"] for entry in lineage}
    known = [
        each
        for each in bench.store.records(testbed=bench.testbed)
        if each.id in led or (each.stage == "eval-bbh" and each.model.get("fingerprint") == record.model["fingerprint"])
    ]
    write_card(folder, model, facts_of(known))


def size_metrics(model: PreTrainedModel) -> list[Metric]:
    replaced = sum(parameter_count(module) for module in replaced_modules(model).values())
    return [Metric("parameters", parameter_count(model)), Metric("replaced_parameters", replaced)]
