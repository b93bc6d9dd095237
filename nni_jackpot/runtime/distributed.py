"""The processes that train one model together, each a rank: what they have in common, and who writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def world() -> int:
    """Return how many processes there are: 1 where nobody has made a group of them."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; the first, 0, is the one that writes files."""
    return distributed.get_rank() if world() > 1 else 0


def of_all(value: T) -> list[T]:
    """Return the values that all processes call this with, in their order."""
    values = [value] * world()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def from_first(ask: Callable[[], T]) -> T:
    """Return what the first process gets for an answer; the others do not ask."""
    if world() == 1:
        return ask()
    answer = [ask() if rank() == 0 else None]
    distributed.broadcast_object_list(answer)
    return answer[0]  # type: ignore[return-value]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all processes."""
    if world() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the first process."""
    if world() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if world() > 1:
        distributed.barrier()
