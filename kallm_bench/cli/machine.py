"""Commands for this machine: fetch, testbed, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.options import Json, Results


def fetch(
    what: Annotated[str, typer.Argument(help="model or bbh.")],
    name: Annotated[str, typer.Argument(help="Hub id of the model; folder for bbh.")] = "",
) -> None:
    """Fetch a model or BIG-Bench Hard, so that everything later works without a network.

    kallm fetch model HuggingFaceTB/SmolLM2-135M-Instruct, kallm fetch bbh BIG-Bench-Hard
    """
    from kallm_bench.errors import ModelError, unknown

    if what == "model":
        from kallm_bench.models import find_model

        console.say(f"Model at {find_model(name or 'bundled').folder}")
    elif what == "bbh":
        from kallm_bench.fetch import fetch_bbh

        with console.Display() as display:
            folder = fetch_bbh(Path(name or "BIG-Bench-Hard"), watch=display)
        console.say(f"BIG-Bench Hard at {folder}. Use it: export KALLM_BBH_DIR={folder.absolute()}")
    else:
        raise ModelError(unknown("thing to fetch", what, ("model", "bbh")))


def name_testbed(
    name: Annotated[str | None, typer.Argument(help="New name for this machine.")] = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Show this machine as records know it, or name it."""
    from kallm_bench.profiling import identity
    from kallm_bench.profiling.hardware import machine_facts
    from kallm_bench.records import ResultsStore

    store = ResultsStore(results)
    called = (
        store.name_testbed(identity(), name, machine_facts()) if name else store.testbed(identity(), machine_facts())
    )
    if as_json:
        console.show_json({"name": called, **identity()})
    else:
        console.show_pairs(called, [(key, str(value)) for key, value in identity().items()])


def doctor(results: Results = Path("results"), as_json: Json = False) -> None:
    """Tell what is installed and at hand: devices, model, data, disk."""
    from kallm_bench.doctor import examine

    findings = examine(results)
    if as_json:
        console.show_json(dict(findings))
    else:
        console.show_pairs("kallm doctor", findings)
