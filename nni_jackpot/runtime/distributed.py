"""The processes that train one model together, each a rank: what they have in common, and who writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def world_size() -> int:
    """Return how many processes there are: 1 where nobody has made a group of them."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; the first, 0, is the one that writes files."""
    return distributed.get_rank() if world_size() > 1 else 0


def all_gather(value: T) -> list[T]:
    """Return the values that all processes call this with, in their order."""
    values = [value] * world_size()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def broadcast_result(ask: Callable[[], T]) -> T:
    """Return what the first process gets for an answer; the others do not ask."""
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
    """Replace tensors by those of the first process."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def barrier() -> None:
    """Go on when all processes have come here."""
    if world_size() > 1:
        distributed.barrier()
