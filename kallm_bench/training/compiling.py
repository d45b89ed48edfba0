"""Whether torch.compile has what it needs on a device."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch


def can_compile(device: torch.device) -> bool:
    """On a GPU from Volta on, with Triton and the C compiler that makes what launches its kernels."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(each) for each in compilers if each)
