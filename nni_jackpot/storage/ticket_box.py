"""A deployed model that switches between the tickets of one base in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nni_jackpot.errors import OtherBaseError, TicketError
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.base_state import parameters_of, state_of
from nni_jackpot.storage.ticket import Ticket


class TicketBox:
    """Named tickets of one base, of which at most one is applied to the model at a time.

    A ticket takes only its own bytes of memory (`Ticket.nbytes`). The box keeps one copy of each tensor that
    its tickets write, and restores these tensors bit for bit, even if they have been changed since.

    Parameters
    ----------
    model
        The base, unwrapped, without a ticket applied. The caller may move it to another device.

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
        """Bytes used in addition to the model: per ticket by name, and for copied tensors under ``""``."""
        copied = sum(tensor.numel() * tensor.element_size() for tensor in self._base.values())
        return {"": copied} | {name: sum(t.nbytes.values()) for name, t in self._tickets.items()}

    def add(self, name: str, ticket: Ticket) -> None:
        """Check a ticket and add it; a ticket of the same name is replaced.

        If the model has tied weights, call ``use(None)`` first.

        Raises
        ------
        OtherBaseError
            If the ticket was found on another base.
        TicketError
            If the ticket cannot be decoded, or would replace the ticket in use.
        MaskError
            If the model is wrapped or cannot be written, or the ticket prunes inputs or outputs.
        """
        if name == self.active:
            raise TicketError(f"ticket {name!r} is in use: call use(None) before you replace it")
        base = state_of(self.model) | self._base
        ticket.compare(base, parameters_of(self.model))
        ticket.check_writable(self.model)
        ticket.check_masks()
        for key in (*ticket.masked, *ticket.statistics, *ticket.tuned):
            if key not in self._base:
                self._base[key] = base[key].clone()
        self._tickets[name] = ticket

    def use(self, name: str | None) -> None:
        """Apply the ticket of a name to the model, or restore the base with None.

        Raises
        ------
        TicketError
            If there is no such ticket; the model is then unchanged.
        OtherBaseError
            If the dtype or shape of a tensor has changed since, such as by ``model.half()``.
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
            except BaseException:  # an interrupt, or out of memory
                self._restore(state)
                raise
        self.active = name

    def _restore(self, state: dict[str, Tensor]) -> None:
        self.active = None
        with torch.no_grad():
            for key, tensor in self._base.items():
                state[key].copy_(tensor)
