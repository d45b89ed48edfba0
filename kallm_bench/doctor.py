"""What is at hand: versions, devices, the model, the data, the disk. Asks, changes nothing, needs no network."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch

from kallm_bench.bbh.tasks import TASKS
from kallm_bench.errors import DeviceError, KallmError
from kallm_bench.files import cache_folder
from kallm_bench.models import find_model
from kallm_bench.profiling.hardware import PACKAGES, driver_version, identity, installed_version
from kallm_bench.training import find_data


def examine(results: Path) -> list[tuple[str, str]]:
    """What was found, as (what, finding) in reading order; a finding that is amiss says what to run."""
    machine = identity()
    versions = [f"{name} {installed_version(name) or 'missing'}" for name in PACKAGES if name != "kallm-bench"]
    return [
        ("kallm", f"{installed_version('kallm-bench') or 'not installed'} on Python {platform.python_version()}"),
        ("packages", ", ".join(versions)),
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"),
        ("GPUs", ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none: everything runs on the CPU"),
        ("NVML", _nvml()),
        ("bundled model", _found(lambda: str(find_model("bundled").folder.name))),
        ("bundled data", _found(lambda: f"chitchat-dataset, sha256 {find_data('bundled').fingerprint[:12]}")),
        ("BIG-Bench Hard", _bbh()),
        ("model cache", str(cache_folder())),
        ("results", f"{results.absolute()}, {len(list(results.glob('*/*/*.json')))} records"),
        ("free disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB here"),
        ("compute threads", str(torch.get_num_threads())),
    ]


def _found(look) -> str:  # type: ignore[no-untyped-def]  # any function that gives a str
    try:
        return f"found: {look()}"
    except KallmError as error:
        return str(error)


def _nvml() -> str:
    try:
        return f"driver {driver_version()}"
    except DeviceError as error:
        return f"not here ({error})"


def _bbh() -> str:
    folder = os.environ.get("KALLM_BBH_DIR")
    if not folder:
        return "KALLM_BBH_DIR is not set: pass --source, or run `kallm fetch bbh`"
    there = sum((Path(folder) / "bbh" / f"{task}.json").is_file() for task in TASKS)
    return f"{there} of {len(TASKS)} tasks in {folder}"
