"""The base of a ticket: the model's own tensors by name, into which zeros and statistics are written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nni_jackpot.errors import MaskError, first_line
from nni_jackpot.masks import check_unwrapped
from nni_jackpot.modules.attributes import plain_state
from nni_jackpot.runtime.terminal import escaped

Model: TypeAlias = nn.Module | Mapping[str, Tensor]

_WRAPPER = "_nni_wrapper."


def state_of(model: Model) -> dict[str, Tensor]:
    """Return the tensors of an unwrapped model, or of its state dict, without copying them.

    Raises
    ------
    MaskError
        If the model is wrapped, or a tensor is sparse, quantized, nested or on the meta device.
    """
    if isinstance(model, nn.Module):
        check_unwrapped(model)
        model = model.state_dict()
    return _plain_values(model)


def base_state(model: Model) -> dict[str, Tensor]:
    """Return the state dict that a model has without NNI's wrappers, with the unmasked weights.

    Raises
    ------
    MaskError
        If a tensor is sparse, quantized, nested or on the meta device.
    """
    if isinstance(model, nn.Module):
        state = plain_state(model)
        return _plain_values({name: tensor for name, tensor in state.items() if _WRAPPER not in name})
    state = {name: tensor for name, tensor in model.items() if _WRAPPER not in name}
    for name in (name for name in model if _WRAPPER in name):
        stem, _, kind = name.rpartition("_")
        if not (kind in ("mask", "score") and stem in model):  # buffers of the wrapper
            state[name.replace(_WRAPPER, "")] = model[name]
    return _plain_values(state)


def parameters_of(model: Model) -> set[str]:
    """Return the names of a model's parameters, wrapped or not; the empty set for a state dict."""
    if not isinstance(model, nn.Module):
        return set()
    return {name.replace(_WRAPPER, "") for name, _ in model.named_parameters(remove_duplicate=False)}


def check_writable(state: Mapping[str, Tensor], masked: Iterable[str], statistics: Collection[str]) -> None:
    """Check that zeros and statistics can be written in place without changing any other tensor.

    Raises
    ------
    MaskError
        If a tensor cannot be written in place, or a statistic shares memory with another tensor.
    """
    for name in (*masked, *statistics):
        begin, end = _span(state[name])
        if end - begin < state[name].numel() * state[name].element_size():
            raise MaskError(f"{escaped(name)} cannot be written in place: its numbers share memory")
        nowhere = torch.zeros((), dtype=torch.bool, device=state[name].device)
        try:
            with torch.no_grad():
                state[name].masked_fill_(nowhere, 0)  # changes nothing, but raises as a change would
        except RuntimeError as error:
            reason = escaped(first_line(error))
            raise MaskError(f"{escaped(name)} cannot be written in place: {reason}") from None
    spans = sorted((str(tensor.device), *_span(tensor), name) for name, tensor in state.items())
    reached: dict[bool, tuple[tuple[str, int], str]] = dict.fromkeys((True, False), (("", 0), ""))
    for device, begin, end, name in spans:
        is_statistic = name in statistics
        limit, other = reached[not is_statistic]
        if begin < end and (device, begin) < limit:
            pair = (name, other) if is_statistic else (other, name)
            raise MaskError(f"statistic {escaped(pair[0])} shares memory with {escaped(pair[1])}")
        reached[is_statistic] = max(reached[is_statistic], ((device, end), name))


def aliases(state: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Iterate over pairs of names of one tensor, such as a tied weight: its first name and another name."""
    first: dict[Any, str] = {}
    for name in names:
        tensor = state[name]
        if tensor.numel():
            place = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
            if (other := first.setdefault(place, name)) != name:
                yield other, name


def _plain_values(state: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            raise MaskError(
                f"{escaped(name)} has no plain values: sparse, quantized, nested or meta tensors are refused"
            )
    return tensors


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and of the byte after its last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
