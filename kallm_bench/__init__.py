"""Kolmogorov-Arnold networks in language models, benchmarked.

After `import kallm_bench`, transformers' AutoModelForCausalLM loads kallm checkpoints. It learns to when transformers
is imported, be that before or after: importing it here would make every `kallm --help` wait for two seconds.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def _register() -> None:
    from kallm_bench.models.modeling import register

    register()


class _WhenTransformersComes(importlib.abc.MetaPathFinder):
    """Steps aside at the first import of transformers, lets it be found as usual, and registers once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenTransformersComes())
