"""One row a family: oracle, largest error, largest finite input, size, and CPU time beside nn.Linear's.

Run it: python tests/table_of_bases.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from basis_oracles import ORACLES

from kallm_bench.kan import BASES, KANLinear, make_basis
from kallm_bench.kan.bases import SQUASHES
from kallm_bench.kan.bases.base import DOMAINS


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 576)
    weight = torch.randn(384, 576)
    linear = seconds(lambda: torch.nn.functional.linear(x, weight))
    print("| family | oracle | error | finite up to (f32, bf16, f16) | parameters | MFLOP | CPU ms | × nn.Linear |")
    print("| --- | --- | --: | --- | --: | --: | --: | --: |")
    with torch.no_grad():
        for name in sorted(BASES):
            layer = KANLinear(576, 384, name)
            took = seconds(lambda layer=layer: layer(x))
            parameters = sum(parameter.numel() for parameter in layer.parameters())
            cells = (
                name,
                ORACLES[name].source,
                f"{error_of(name):.0e}",
                ", ".join(finite_up_to(name, kind) for kind in (torch.float32, torch.bfloat16, torch.float16)),
                f"{parameters:,}",
                f"{2 * layer.coefficients.numel() / 1e6:.2f}",
                f"{1000 * took:.1f}",
                f"{took / linear:.1f}",
            )
            print("| " + " | ".join(cells) + " |")
    print(f"\nnn.Linear 576 -> 384 on 2,048 rows, float32, {torch.get_num_threads()} threads: {1000 * linear:.1f} ms")


def error_of(name: str) -> float:
    """The largest error over functions up to degree 8, relative to each function's largest value."""
    family, given = BASES[name], {key: p.default for key, p in BASES[name].arguments().items()}
    if "degree" in given:
        given["degree"] = min(8, make_basis(name)._safe_degree() if hasattr(family, "_safe_degree") else 8)
    basis = make_basis(name, **given)
    basis = basis.bound(basis.groups or 1).double()
    basis.reset_parameters()
    x = np.linspace(*DOMAINS[basis.squash], 101)
    values = basis(torch.from_numpy(x)[:, None].expand(-1, basis.groups or 1))[..., 0].numpy()
    true = [ORACLES[name].values(k, x, **given) for k in range(basis.size)]
    return max(float(np.abs(values[:, k] - t).max() / np.abs(t).max()) for k, t in enumerate(true))


def finite_up_to(name: str, kind: torch.dtype) -> str:
    """The largest power of ten up to which raw inputs give finite values."""
    basis = make_basis(name)
    basis = basis.bound(basis.groups or 4).to(kind)
    reached = 0.0
    for power in range(39):
        x = torch.tensor([[10.0**power, -(10.0**power), 0.5, -0.5]]).repeat(1, (basis.groups or 4) // 4).to(kind)
        if not x.isfinite().all() or not basis(SQUASHES[basis.squash](x)).isfinite().all():
            break
        reached = 10.0**power
    return f"{reached:.0e}"


def seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
