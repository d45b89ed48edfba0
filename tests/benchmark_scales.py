"""How far the loss that a family of functions trains to follows from how much its functions vary.

Adam moves every coefficient about as far, so a layer whose functions vary more changes more with each step, as if its
learning rate were higher. For every arm of a suite that is a stack of one family, with a function on each edge: the
root of the summed variances of its functions over squashed N(0, 1) inputs, beside the held-out loss of its newest
training.

Run it: python tests/benchmark_scales.py [bases] [--testbed h100]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from kallm_bench.kan import make_basis
from kallm_bench.kan.bases.base import SQUASHES
from kallm_bench.records import ResultsStore

TOKENS, CHANNELS = 20_000, 64

LEAST = 5
"""Arms that a correlation is told of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="?", default="bases")
    parser.add_argument("--testbed", default="h100")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    asked = parser.parse_args()
    records = ResultsStore(asked.results).records(asked.suite, asked.testbed)
    trained = {record.arm: record for record in records if record.stage == "train" and record.model.get("specs")}
    specs = {arm: record.model["specs"][-1] for arm, record in trained.items()}
    found = sorted(
        (record.value("heldout_loss") or math.nan, variation(specs[arm]), arm)
        for arm, record in trained.items()
        if is_one_family(specs[arm])
    )
    print("| arm | functions' variation | held-out loss |")
    print("| --- | --: | --: |")
    for loss, size, arm in found:
        print(f"| {arm} | {size:.2f} | {loss:.3f} |")
    groups = {"all": found}
    for each in found:
        degree = specs[each[2]].get("degree")
        groups.setdefault(f"of degree {degree}" if degree else "without a degree", []).append(each)
    print()
    for name, of in groups.items():
        if len(of) >= LEAST:
            rank = spearmanr([size for _, size, _ in of], [loss for loss, _, _ in of])
            print(f"{len(of)} arms, {name}: Spearman's rank correlation {rank.statistic:.2f} (p = {rank.pvalue:.1g})")


def is_one_family(spec: dict[str, Any]) -> bool:
    """Whether its feed-forwards are two KAN layers of one family, with nothing beside the functions."""
    plain = spec["basis"] not in ("linear", "drop") and not set("+>") & set(spec["basis"])
    return plain and spec["form"] == "stack" and not spec.get("linear")


def variation(spec: dict[str, Any]) -> float:
    """The root of the sum over functions of their variances; of a constant one that is 0."""
    basis = make_basis(spec["basis"], degree=spec.get("degree")).bound(CHANNELS).double()
    inputs = torch.randn(TOKENS, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = basis(SQUASHES[basis.squash](inputs))  # (T, K, I)
    return float(values.var(0).mean(-1).sum().sqrt())


if __name__ == "__main__":
    main()
