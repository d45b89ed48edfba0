"""The page that a checkpoint shows of itself: what was replaced, where it came from, how to load it, what it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kallm_bench.models.modeling import MODELING_FILE
from kallm_bench.models.spec import KANSpec
from kallm_bench.models.standalone import modeling_file


def model_card(
    name: str,
    parameters: int,
    specs: Sequence[KANSpec],
    lineage: Sequence[Mapping[str, str]] = (),
    base: Mapping[str, str] | None = None,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """README.md of a checkpoint, with the hub's metadata at its head.

    Args:
        name: class of the architecture.
        lineage: {"id", "key", "stage"} of the records that led here, oldest first.
        base: {"source", "fingerprint"} of the model that was retrofitted first.
        facts: what is known of it, such as ("held-out loss", "2.71").
    """
    source = (base or {}).get("source", "")
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if "/" in source:  # a hub id, which the hub can link
        head.append(f"base_model: {source}")
    tags = ["tags:", "- kolmogorov-arnold-network"] if any(spec.is_basis for spec in specs) else []
    body = [f"# {name}, {parameters:,} parameters", ""]
    if specs:
        body += [f"Replaced{f' in {source}' if source else ''} by kallm, in order:"]
        body += [_described(spec) for spec in specs] + [""]
    else:
        body += ["No part was replaced.", ""]
    if facts:
        body += ["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in facts), ""]
    if lineage:
        body += ["Records that led here:", *(f"- {entry['stage']}: {entry['id']}" for entry in lineage), ""]
    body.append("Load it with `import kallm_bench` and `AutoModelForCausalLM.from_pretrained(folder)`.")
    if specs and modeling_file(specs) is not None:
        body += [
            f"Without kallm_bench: read `{MODELING_FILE}`, which holds the model's code in plain PyTorch, then",
            "`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.",
        ]
    return "\n".join([*head, *tags, "---", *body, ""])


def _described(spec: KANSpec) -> str:
    """A retrofit in a line of a list."""
    blocks = ", ".join(map(str, spec.blocks))
    what = {
        "feedforward": "feed-forward",
        "linears": "linear layers of the feed-forward",
        "attention": "attention",
        "linears+attention": "linear layers of the attention and the feed-forward",
    }
    details = [f"form {spec.form}"] if spec.is_basis and (spec.target == "feedforward" or spec.is_adapter) else []
    details += [f"degree {spec.degree}"] if spec.degree else []
    details += [f"hidden {spec.hidden}"] if spec.hidden else []
    details += [f"rank {spec.rank}"] if spec.rank else []
    return f"- {what[spec.target]} of blocks {blocks}: {', '.join([spec.basis, *details, f'start {spec.start}'])}"
