"""Collective operations of the processes that train one model; no-ops in a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes: 1 without an initialized process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; rank 0 writes the files."""
    return distributed.get_rank() if world_size() > 1 else 0


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, in rank order."""
    values = [value] * world_size()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def broadcast_result(ask: Callable[[], T]) -> T:
    """Call ``ask`` on rank 0 only, and return its result on every rank."""
    if world_size() == 1:
        return ask()
    answer = [ask() if rank() == 0 else None]
    distributed.broadcast_object_list(answer)
    return answer[0]  # type: ignore[return-value]


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all processes."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by the tensors of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until all processes have called this."""
    if world_size() > 1:
        distributed.barrier()
