"""Attributes of a module that are computed when they are read, whoever reads them.

A weight is read by more than its own module's forward: ``F.linear(x, self.qkv.weight)``, a fast path that
asks for ``layer.linear1.weight``, an output layer that shares the embedding's weight. The module therefore
gets a subclass of its class with a property for the attribute, as ``torch.nn.utils.parametrize`` does it.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

# In the ``__dict__`` of a module: what of it is computed.
_COMPUTED = "_jackpot_computed"
_subclasses: dict[tuple[Any, frozenset[str]], type[nn.Module]] = {}


class Reader(Protocol):
    """What computes attributes."""

    def parameter(self, name: str) -> nn.Parameter | None:
        """Return the parameter that an attribute is computed from; None if it is no single one."""

    def read(self, name: str) -> Any:
        """Return the value of an attribute."""

    def give(self, name: str, value: Tensor | None) -> None:
        """Take the value that somebody assigns to an attribute."""


class Source(NamedTuple):
    """Where an attribute comes from."""

    reader: Reader
    name: str
    """The name under which the reader knows the attribute; a tied weight has one in each of its modules."""


@dataclass
class Computed:
    """What of a module is computed."""

    order: list[str]
    """The names of the parameters that the module came with, in their order."""
    sources: dict[str, Source] = field(default_factory=dict)


def compute(module: nn.Module, name: str, source: Source) -> None:
    """Take a parameter out of a module, and let the attribute be computed from now on."""
    computed: Computed = module.__dict__.setdefault(_COMPUTED, Computed(list(module._parameters)))
    module._parameters.pop(name, None)
    computed.sources[name] = source
    module.__class__ = _subclass(plain_class(module), frozenset(computed.sources))


def stop_computing(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Undo `compute`: put the parameter back into its place, unless there was none.

    The module has the class that it came with once none of its attributes is computed.
    """
    computed: Computed = module.__dict__[_COMPUTED]
    del computed.sources[name]
    plain = plain_class(module)
    if computed.sources:
        module.__class__ = _subclass(plain, frozenset(computed.sources))
    else:
        module.__class__ = plain
        del module.__dict__[_COMPUTED]
    if parameter is not None:
        held = {**module._parameters, name: parameter}
        in_order = [*(n for n in computed.order if n in held), *(n for n in held if n not in computed.order)]
        module._parameters.clear()
        module._parameters.update((n, held[n]) for n in in_order)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that a model would have if none of its attributes were computed, in its order."""
    state, found = model.state_dict(), {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        computed: Computed | None = module.__dict__.get(_COMPUTED)
        for name in (*(module._parameters if computed is None else computed.order), *module._buffers):
            source = None if computed is None else computed.sources.get(name)
            full_name = f"{prefix}.{name}" if prefix else name
            value = state.get(full_name) if source is None else source.reader.parameter(source.name)
            if value is not None:
                found[full_name] = value.detach()
    return found


def is_computed(module: nn.Module, name: str) -> bool:
    """Return True if an attribute of a module is computed."""
    return _COMPUTED in module.__dict__ and name in module.__dict__[_COMPUTED].sources


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module came with."""
    return getattr(type(module), "_jackpot_plain_class", type(module))


def _subclass(plain: Any, names: frozenset[str]) -> type[nn.Module]:
    """Return the class with properties of these names, the same one each time."""
    if (plain, names) not in _subclasses:
        _subclasses[plain, names] = _make_subclass(plain, names)
    return _subclasses[plain, names]


def _make_subclass(plain: Any, names: Iterable[str]) -> type[nn.Module]:
    """Return a class of the same name, for NNI selects modules by the names of their classes."""
    members: dict[str, Any] = {name: _property(name) for name in names}
    members |= {
        "_jackpot_plain_class": plain,
        "__reduce_ex__": _reduce_ex,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    bases = (_Unannounced, plain)
    return types.new_class(plain.__name__, bases, {}, lambda namespace: namespace.update(members))


class _Unannounced:
    """Keeps the subclass from a class that counts its subclasses, or wants arguments for each."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _property(name: str) -> property:
    def read(module: nn.Module) -> Any:
        source = module.__dict__[_COMPUTED].sources[name]
        return source.reader.read(source.name)

    def give(module: nn.Module, value: Tensor | None) -> None:
        source = module.__dict__[_COMPUTED].sources[name]
        source.reader.give(source.name, value)

    return property(read, give)


def _reduce_ex(module: nn.Module, protocol: Any) -> Any:
    """Serve pickle and copy, which cannot find a class that is made at run time by its name."""
    plain = plain_class(module)
    make, arguments, *rest = cast(tuple[Any, ...], plain.__reduce_ex__(module, protocol))
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make, arguments = _new, (plain, tuple(module.__dict__[_COMPUTED].sources))
    return make, arguments, *rest


def _new(plain: type[nn.Module], names: Iterable[str]) -> nn.Module:
    subclass = _subclass(plain, frozenset(names))
    return subclass.__new__(subclass)
