"""CUDA graphs of the two parts of a decoder: hundreds of kernels for one call from Python.

A step of a small model is over before Python has launched all of it. So the frozen part is recorded once for each shape
of a batch, and the learning part too, forward and backward. Both take their memory from one pool, one after the other,
as they are replayed: what a part gave stands until the other part, or the next batch, is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UPS = 3
"""Runs before a recording: the first compiles, and libraries make what they keep."""


class FrozenGraph:
    """A function of tensors of one shape that nothing is learned in, recorded once and replayed.

    Args:
        function: called with tensors like `samples`; gives one tensor.
        pool: of torch.cuda.graph_pool_handle.
    """

    def __init__(self, function: Callable[..., Tensor], samples: tuple[Tensor, ...], pool: Any) -> None:
        self._fed = tuple(sample.clone() for sample in samples)
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                function(*self._fed)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._given = function(*self._fed)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for here, there in zip(self._fed, inputs, strict=True):
            here.copy_(there, non_blocking=True)
        self._graph.replay()
        return self._given


class _Function(nn.Module):
    """A function of tensors and of the parameters of a module that it calls."""

    def __init__(self, function: Callable[..., Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def learning_graph(
    function: Callable[..., Tensor], module: nn.Module, samples: tuple[Tensor, ...], pool: Any
) -> Callable[..., Tensor]:
    """A function of tensors of one shape that `module` learns in, recorded forward and backward.

    The gradients of parameters lie in the graph's memory: whoever runs it again before they were used copies them out.
    """
    fed = (*(sample.clone() for sample in samples[:-1]), samples[-1])  # what enters need not be copied where it is
    with torch.enable_grad():
        recorded: Any = torch.cuda.make_graphed_callables(
            _Function(function, module), fed, num_warmup_iters=WARM_UPS, allow_unused_input=True, pool=pool
        )
    graphed: Callable[..., Tensor] = recorded
    return graphed


def looking_graph(function: Callable[..., Tensor], samples: tuple[Tensor, ...], pool: Any) -> FrozenGraph:
    """The forward pass of a `learning_graph`, kernel by kernel, without what it keeps for backward.

    Compiled without gradients, it would round otherwise in places; recorded with its backward, it would hold as much
    memory again as training does.
    """

    def forward(*inputs: Tensor) -> Tensor:
        return function(*inputs).detach()

    with torch.enable_grad():
        return FrozenGraph(forward, samples, pool)
