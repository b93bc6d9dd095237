"""Many tickets, one base: a deployed model that changes its jackpot in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nni_jackpot.errors import OtherBaseError, TicketError
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.base_state import parameters_of, state_of
from nni_jackpot.storage.ticket import Ticket


class TicketBox:
    """Tickets of one base by name, one of which is in the model at a time, or none.

    A ticket takes no more memory than its bytes (`Ticket.nbytes`). The box keeps one copy of the tensors that
    its tickets write into, so that these come back bit for bit, whatever was done to them meanwhile.

    Parameters
    ----------
    model
        The base, unwrapped, no ticket applied. It stays the caller's, and may be moved to another device.

    Examples
    --------
    >>> box = TicketBox(model)
    >>> box.add("cats", load_ticket("cats.ticket"))
    >>> box.add("dogs", load_ticket("dogs.ticket"))
    >>> box.use("cats")
    >>> box.use(None)  # the base
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._tickets: dict[str, Ticket] = {}
        self._base: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """The names of the tickets."""
        return list(self._tickets)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that the box takes beside the model: of each ticket by name, and under ``""`` of the copy."""
        copied = sum(tensor.numel() * tensor.element_size() for tensor in self._base.values())
        return {"": copied} | {name: sum(t.nbytes.values()) for name, t in self._tickets.items()}

    def add(self, name: str, ticket: Ticket) -> None:
        """Put a ticket into the box, all of it checked, in the place of another of that name.

        Where two names stand for one tensor (tied weights), call ``use(None)`` first.

        Raises
        ------
        OtherBaseError
            If it was found on another base.
        TicketError
            If it cannot be decoded, or is to replace the one in use.
        MaskError
            If the model is wrapped or cannot be written, or the ticket prunes inputs or outputs.
        """
        if name == self.active:
            raise TicketError(f"ticket {name!r} is in use: call use(None) before you replace it")
        base = state_of(self.model) | self._base
        ticket.compare(base, parameters_of(self.model))
        ticket.check_writable(self.model)
        ticket.check_masks()
        for key in (*ticket.masked, *ticket.statistics):
            if key not in self._base:
                self._base[key] = base[key].clone()
        self._tickets[name] = ticket

    def use(self, name: str | None) -> None:
        """Give the model the ticket of this name, or with None the base.

        Raises
        ------
        TicketError
            If there is no such ticket; the model is then as it was.
        OtherBaseError
            If the model has been given other tensors since, such as by ``model.half()``.
        """
        if name is not None and name not in self._tickets:
            names = escaped(", ".join(self._tickets)) or "none"
            raise TicketError(f"there is no ticket {name!r} in the box, but {names}")
        state = state_of(self.model)
        for key, tensor in self._base.items():
            if key not in state or (state[key].dtype, state[key].shape) != (tensor.dtype, tensor.shape):
                raise OtherBaseError(f"the model has another {escaped(key)} than when its tickets were added")
        self._restore(state)
        if name is not None:
            try:
                self._tickets[name].write(state)
            except BaseException:  # an interrupt, or no memory left
                self._restore(state)
                raise
        self.active = name

    def _restore(self, state: dict[str, Tensor]) -> None:
        self.active = None
        with torch.no_grad():
            for key, tensor in self._base.items():
                state[key].copy_(tensor)
