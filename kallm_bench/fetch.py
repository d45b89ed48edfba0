"""Fetching, so that everything later works without a network."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from kallm_bench.bbh.tasks import TASKS
from kallm_bench.errors import BBHError
from kallm_bench.files import new_folder
from kallm_bench.progress import Watch, nobody

BBH_COMMIT = "9ee07bd481feebf959a6b59d61ea57bdcf30964d"
BBH_ADDRESS = f"https://raw.githubusercontent.com/suzgunmirac/BIG-Bench-Hard/{BBH_COMMIT}"


def fetch_bbh(folder: Path, address: str = BBH_ADDRESS, watch: Watch = nobody) -> Path:
    """Downloads BIG-Bench Hard at a pinned commit: questions, few-shot texts, licence. All of it or nothing.

    Raises:
        BBHError: the network, or the address, did not give a file; says which.
        DiskError: the folder exists, or cannot be written.
    """
    files = [f"bbh/{task}.json" for task in TASKS] + [f"cot-prompts/{task}.txt" for task in TASKS] + ["LICENSE"]
    with new_folder(folder) as temporary:
        for number, name in enumerate(files):
            watch("fetching BIG-Bench Hard", number, len(files), name)
            try:
                with urllib.request.urlopen(f"{address}/{name}", timeout=30) as answer:
                    content = answer.read()
            except (urllib.error.URLError, TimeoutError) as error:
                raise BBHError(f"cannot fetch {name}: {error}. Copy the repository's folder by other means") from error
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    return folder
