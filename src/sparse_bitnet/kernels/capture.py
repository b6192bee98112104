"""Launches that are recorded once and then go out together, so that none of them waits for Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def capture(run: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """The CUDA graph of `run` on a GPU, and what it gives: tensors that every replay writes anew.

    `run` is called once before, for whatever is compiled or chosen on the way, and then to be recorded, which computes
    nothing. What it reads must stay where it is.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # what other threads do is their affair
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = run()
    return graph, output
