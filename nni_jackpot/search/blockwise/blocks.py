"""The blocks of a network: which they are, and what the network calls them with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nni_jackpot.errors import BlocksError
from nni_jackpot.modules.batches import call_model, inputs_of

# Arguments that a block writes into: caches of keys and values, which no second forward may find filled.
_CACHES = ("past_key_value", "past_key_values", "layer_past", "kv_cache")


class _Done(Exception):
    """Ends a forward after the last block."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, without its input.

    Attributes
    ----------
    args, kwargs
        The arguments, the input left out.
    input_name
        Name of the input among ``kwargs``; None if it is the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    input_name: str | None

    def run(self, block: nn.Module, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the output of a block for an input, with some of its parameters replaced."""
        args, kwargs = self.args, dict(self.kwargs)
        if self.input_name is None:
            args = (hidden, *args)
        else:
            kwargs[self.input_name] = hidden
        return output_of(functional_call(block, dict(parameters or {}), args, kwargs))


@dataclass
class Captured:
    """What a network calls its blocks with, batch by batch.

    Attributes
    ----------
    hidden
        The input of the first block for every batch.
    calls
        For every block, its other arguments for every batch. Blocks share the tensors that they are given.
    tokens
        For every batch the tokens that count, boolean, of shape (batch, tokens); None where all count.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    tokens: list[Tensor | None]


def blocks_of(model: nn.Module) -> list[str]:
    """Return the names of a network's blocks.

    They are the children of the ModuleList or Sequential that holds the most weights, if all are of one type:
    the encoder layers of BERT, the decoder layers of Llama, the blocks of a vision transformer.

    Raises
    ------
    BlocksError
        If there is no such list, or another list holds blocks of the same type, as in an encoder-decoder or
        in the stages of a ResNet: such blocks have to be named.
    """
    found: dict[str, type[nn.Module]] = {}
    for name, module in model.named_modules():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(children) < 2:
            continue
        is_inner = any(name.startswith(f"{outer}.") for outer in found)
        if len({type(child) for child in children}) == 1 and _weights(children[0]) and not is_inner:
            found[name] = type(children[0])
    if not found:
        raise BlocksError(
            "the model has no list of blocks of one type: name its blocks, such as "
            "blocks=['layer1.0', 'layer1.1']"
        )
    largest = max(found, key=lambda name: _weights(model.get_submodule(name)))
    alike = [name for name, kind in found.items() if kind is found[largest]]
    if len(alike) > 1:
        raise BlocksError(
            f"{', '.join(alike)} hold blocks of the same type: name the blocks in the order in which the "
            "model runs them, such as blocks=['layer1.0', 'layer1.1']"
        )
    return [f"{largest}.{name}" for name, _ in model.get_submodule(largest).named_children()]


@torch.no_grad()
def capture(model: nn.Module, blocks: Sequence[str], batches: Iterable[Any]) -> Captured:
    """Run a network on batches, and note what it calls its blocks with.

    Parameters
    ----------
    model
        The network, in evaluation mode.
    blocks
        Names of its blocks, in the order in which the network runs them.
    batches
        Inputs; see `nni_jackpot.modules.batches.call_model`. An ``attention_mask`` of shape (batch, tokens)
        says which tokens count.

    Raises
    ------
    BlocksError
        If there is no batch, a block is not called once a forward, or the output of a block is not the input
        of the next one.
    """
    modules = [model.get_submodule(name) for name in blocks]
    captured = Captured([], [[] for _ in blocks], [])
    seen: list[tuple[str, Tensor]] = []

    def before(i: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split(blocks[i], args, kwargs)
        captured.calls[i].append(call)
        if i == 0:
            captured.hidden.append(hidden.detach())
        seen.append((blocks[i], hidden))

    def after(i: int, _: nn.Module, args: Any, result: Any) -> None:
        outputs.append(output_of(result))
        if i == len(blocks) - 1:
            raise _Done

    outputs: list[Tensor] = []
    handles = []
    for i, module in enumerate(modules):
        handles.append(module.register_forward_pre_hook(partial(before, i), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, i)))
    try:
        with without_caches(model):
            for batch in batches:
                seen.clear()
                outputs.clear()
                captured.tokens.append(_tokens(model, batch))
                with suppress(_Done):  # what follows the last block need not be computed
                    call_model(model, batch, next(model.parameters()).device)
                _check_chain(blocks, seen, outputs)
    finally:
        for handle in handles:
            handle.remove()
    if not captured.hidden:
        raise BlocksError("a search block by block needs one batch of calibration data at least, got none")
    return captured


def output_of(result: Any) -> Tensor:
    """Return the output of a block; of several, the first is what the next block gets."""
    return result[0] if isinstance(result, tuple | list) else result


def _split(block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    kwargs = {name: None if name in _CACHES else value for name, value in kwargs.items()}
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], kwargs, None)
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            del kwargs[name]
            return value, Call(args, kwargs, name)
    raise BlocksError(f"{block} is called without a tensor as its input")


def _check_chain(blocks: Sequence[str], seen: list[tuple[str, Tensor]], outputs: list[Tensor]) -> None:
    names = [name for name, _ in seen]
    if names != list(blocks):
        raise BlocksError(f"the model calls the blocks in the order {names}, not {list(blocks)}")
    for i in range(1, len(seen)):
        if not torch.equal(seen[i][1], outputs[i - 1]):
            raise BlocksError(f"the input of {names[i]} is not the output of {names[i - 1]}")


def _tokens(model: nn.Module, batch: Any) -> Tensor | None:
    mask = inputs_of(model, batch)[1].get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers keep no keys and values for later tokens."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before  # type: ignore[union-attr]
