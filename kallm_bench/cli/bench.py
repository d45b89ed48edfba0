"""The bench that a command works on, made of its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kallm_bench import console

if TYPE_CHECKING:
    from kallm_bench.filing import Bench
    from kallm_bench.records import ResultsStore
    from kallm_bench.training import Processes


def make_bench(
    results: Path,
    display: console.Display,
    device: str,
    dtype: str,
    batch_size: int | None,
    seed: int = 0,
    suite_file: str = "",
    processes: Processes | None = None,
    sharded: bool = False,
    prefix_cache: bool = False,
    keep_weights: bool = True,
    trackers: tuple[str, ...] = (),
    dry: bool = False,
) -> Bench:
    """The bench of a command; refuses an unwritable results folder before any work is done. `dry` makes no folder."""
    from kallm_bench.errors import DeviceError
    from kallm_bench.filing import Bench
    from kallm_bench.profiling import find_device, find_dtype, identity
    from kallm_bench.profiling.hardware import machine_facts
    from kallm_bench.records import ResultsStore
    from kallm_bench.training import ALONE, asked_for

    if processes is None and asked_for() > 1:
        raise DeviceError(
            f"{asked_for()} processes were started for this; only `kallm train` and `kallm eval-bbh` run on several"
        )
    processes = processes or ALONE
    where = processes.device or find_device(device)
    computes_in = find_dtype(dtype, where)
    store = ResultsStore(results)
    return Bench(
        store,
        store.known_testbed(identity()) if dry else store.testbed(identity(), machine_facts()),
        Path("runs"),
        where,
        computes_in,
        seed=seed,
        suite_file=suite_file,
        batch_size=batch_size,
        processes=processes,
        sharded=sharded,
        prefix_cache=prefix_cache,
        keep_weights=keep_weights,
        trackers=trackers,
        watch=display,
    )


def tell_damaged(store: ResultsStore) -> None:
    for path, reason in dict(store.damaged).items():
        console.tell(f"set aside: {path}: {reason}")
