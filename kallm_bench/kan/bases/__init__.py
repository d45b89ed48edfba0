"""The truth: every basis in plain PyTorch, one small file a family. Importing this folder registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from kallm_bench.kan.bases.base import BASES, SQUASHES, Basis, make_basis

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["BASES", "SQUASHES", "Basis", "make_basis"]
