"""Norms as one operator: the same but for rounding, only where they are the same, and only inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kallm_bench.bbh.norms import norms_in_one

ARGUMENTS = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


def lively(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight += torch.linspace(-0.5, 2, 24)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_is_as_exact_as_it_was(dtype: torch.dtype) -> None:
    norm = lively(LlamaRMSNorm(24)).to(dtype)
    x = ARGUMENTS.to(dtype)
    written = norm(x)
    with norms_in_one(norm):
        assert "forward" in vars(norm)
        found = norm(x)
    assert "forward" not in vars(norm)
    assert torch.equal(norm(x), written)
    truth = copy.deepcopy(norm).double()
    true = truth.weight * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * true.abs().max()
    assert (found - true).abs().max() <= 2 * (written - true).abs().max() + rounding


def test_of_two_types_a_norm_stays_as_it_was() -> None:
    norm, x = lively(LlamaRMSNorm(24)), ARGUMENTS.bfloat16()
    expected = norm(x)
    with norms_in_one(norm):
        found = norm(x)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


class OtherRMSNorm(LlamaRMSNorm):
    """Adds something."""

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states) + 0.1


@pytest.mark.parametrize("norm", [GemmaRMSNorm(24), OtherRMSNorm(24), nn.LayerNorm(24), nn.RMSNorm(24)], ids=repr)
def test_what_is_something_else_stays(norm: nn.Module) -> None:
    expected = lively(norm)(ARGUMENTS)
    with norms_in_one(norm):
        assert "forward" not in vars(norm)
        assert torch.equal(norm(ARGUMENTS), expected)


def test_norms_come_back_after_an_error(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)

    def fail() -> None:
        with norms_in_one(model):
            assert sum("forward" in vars(module) for module in model.modules()) == 2 * 4 + 1
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert not any("forward" in vars(module) for module in model.modules())
