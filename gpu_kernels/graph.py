"""A layer's launches as a CUDA graph: the host starts one thing instead of four.

What is captured reads the routing and a table of slot addresses when it runs (`FusedExperts.add_by_table`), so a
graph stays valid when other experts are chosen and when the table's contents change. Inputs go through tensors of its
own: the addresses that a graph was captured with are those it reads for ever.
"""

from collections.abc import Callable

import torch

Launches = Callable[[], None]
Capture = Callable[[Launches], Launches]


def capture_cuda(launches: Launches) -> Launches:
    """What starts all of `launches` again. Kernels are loaded by a run before: that is forbidden while capturing."""
    here = torch.cuda.current_stream()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        launches()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    return graph.replay


class GraphedLayer:
    """function(hidden [T, H], index [T, K], weights [T, K], out [T, H]) for inputs like the ones given, as a graph."""

    def __init__(
        self,
        function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        capture: Capture = capture_cuda,
    ) -> None:
        self._inputs = hidden.clone(), index.clone(), weights.clone()
        self._out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self._replay = capture(lambda: function(*self._inputs, self._out))

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The output, in a tensor of its own."""
        for mine, given in zip(self._inputs, (hidden, index, weights), strict=True):
            mine.copy_(given)
        self._replay()
        return self._out.clone()
