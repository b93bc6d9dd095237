"""Module attributes that are computed on every read, such as masked weights.

Not only the module's own forward reads its weight: ``F.linear(x, self.qkv.weight)``, a fast path that reads
``layer.linear1.weight``, an output layer that shares the embedding's weight. The module's class is therefore
replaced by a subclass with a property for the attribute, as in ``torch.nn.utils.parametrize``.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from nni_jackpot.modules.parameters import join

# Key in the ``__dict__`` of a module for its `Computed`.
_COMPUTED = "_jackpot_computed"
_subclasses: dict[tuple[Any, frozenset[str]], type[nn.Module]] = {}


class Reader(Protocol):
    """An object that computes attributes."""

    def parameter(self, name: str) -> nn.Parameter | None:
        """Return the parameter that an attribute is computed from; None unless there is exactly one."""

    def read(self, name: str) -> Any:
        """Return the value of an attribute."""

    def give(self, name: str, value: Tensor | None) -> None:
        """Handle the assignment of a value to an attribute."""


class Source(NamedTuple):
    """The source of an attribute's value."""

    reader: Reader
    name: str
    """The reader's name for the attribute; a tied weight has one in each of its modules."""


@dataclass
class Computed:
    """The computed attributes of a module."""

    order: list[str]
    """The names of the module's original parameters, in order."""
    sources: dict[str, Source] = field(default_factory=dict)


def compute(module: nn.Module, name: str, source: Source) -> None:
    """Remove a parameter from a module, and compute the attribute on every read instead."""
    computed: Computed = module.__dict__.setdefault(_COMPUTED, Computed(list(module._parameters)))
    module._parameters.pop(name, None)
    computed.sources[name] = source
    module.__class__ = _subclass(plain_class(module), frozenset(computed.sources))


def stop_computing(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Undo `compute`: restore the parameter, if any, at its original position.

    The module gets its original class back when its last computed attribute is undone.
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
    """Return the state dict that the model has without computed attributes, in the same order."""
    state, found = model.state_dict(), {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        computed: Computed | None = module.__dict__.get(_COMPUTED)
        for name in (*(module._parameters if computed is None else computed.order), *module._buffers):
            source = None if computed is None else computed.sources.get(name)
            full_name = join(prefix, name)
            value = state.get(full_name) if source is None else source.reader.parameter(source.name)
            if value is not None:
                found[full_name] = value.detach()
    return found


def source_names(model: nn.Module) -> Iterator[str]:
    """Iterate over the names in a state dict of the parameters that attributes are computed from."""
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        computed: Computed | None = module.__dict__.get(_COMPUTED)
        for source in () if computed is None else computed.sources.values():
            yield join(names[source.reader], source.name)


def is_computed(module: nn.Module, name: str) -> bool:
    """Return True if an attribute of a module is computed."""
    return _COMPUTED in module.__dict__ and name in module.__dict__[_COMPUTED].sources


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the original class of a module."""
    return getattr(type(module), "_jackpot_plain_class", type(module))


def _subclass(plain: Any, names: frozenset[str]) -> type[nn.Module]:
    """Return the cached subclass with properties of these names."""
    if (plain, names) not in _subclasses:
        _subclasses[plain, names] = _make_subclass(plain, names)
    return _subclasses[plain, names]


def _make_subclass(plain: Any, names: Iterable[str]) -> type[nn.Module]:
    """Create the subclass, with the same name: NNI selects modules by their class names."""
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
    """Hide the new subclass from ``__init_subclass__``, which may count subclasses or require arguments."""

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
    """Support pickle and copy, which cannot look up a class created at run time by name."""
    plain = plain_class(module)
    make, arguments, *rest = cast(tuple[Any, ...], plain.__reduce_ex__(module, protocol))
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make, arguments = _new, (plain, tuple(module.__dict__[_COMPUTED].sources))
    return make, arguments, *rest


def _new(plain: type[nn.Module], names: Iterable[str]) -> nn.Module:
    subclass = _subclass(plain, frozenset(names))
    return subclass.__new__(subclass)
