"""NNI's tracer on all functions and layers of PyTorch that a network can contain."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torchvision.ops
from torch import nn
from torch.nn import functional as F
from traced_calls import ELSEWHERE, FUNCTIONS, LIMITS, NO_OPERATIONS, OPERATORS
from traced_layers import LAYERS, NO_LAYERS
from traced_networks import check_traced, network, returning

import nni_jackpot  # noqa: F401

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"  # of functions that PyTorch will remove
)

INITIALS = sorted({name[0] for name in FUNCTIONS})


@pytest.mark.parametrize("initial", INITIALS)
def test_functions_trace(tmp_path: Path, initial: str) -> None:
    names = [name for name in FUNCTIONS if name.startswith(initial) and hasattr(F, name)]
    check_traced(network(tmp_path, returning(_outputs(call for name in names for call in FUNCTIONS[name]))))


def test_operators_trace(tmp_path: Path) -> None:
    names = [name for name in OPERATORS if hasattr(torchvision.ops, name)]
    check_traced(network(tmp_path, returning(_outputs(call for name in names for call in OPERATORS[name]))))


@pytest.mark.parametrize("call", LAYERS)
def test_layers_trace(tmp_path: Path, call: str) -> None:
    layers = [layer for layer in LAYERS[call] if hasattr(*_place_of(layer))]
    calls = [call.replace("layer", f"self.layer{i}") for i in range(len(layers))]
    check_traced(network(tmp_path, returning(_outputs(calls)), layers))


@pytest.mark.parametrize(("layer", "call", "error", "reason"), LIMITS)
def test_what_cannot_be_traced_is_known(
    tmp_path: Path, layer: str, call: str, error: type[Exception], reason: str
) -> None:
    model = network(tmp_path, returning(call), [layer])
    with pytest.raises(error):
        check_traced(model)


def test_no_function_is_left_out() -> None:
    public = {
        name
        for name, function in vars(F).items()
        if not name.startswith("_")
        and callable(function)
        and not isinstance(function, type)
        and str(getattr(function, "__module__", "torch")).startswith("torch")
    }
    assert public - FUNCTIONS.keys() - ELSEWHERE.keys() - NO_OPERATIONS == set()


def test_no_layer_and_no_operator_is_left_out() -> None:
    traced = {_place_of(layer) for layers in LAYERS.values() for layer in layers}
    traced |= {_place_of(layer) for layer, *_ in LIMITS}
    layers = {name for place, name in traced if place is nn}
    assert set(nn.modules.__all__) - layers - NO_LAYERS == set()
    operators = {name for place, name in traced if place is torchvision.ops}
    assert set(torchvision.ops.__all__) - operators - OPERATORS.keys() == set()


def _outputs(calls: Iterable[str]) -> str:
    """Return the source of a dict of the outputs of calls, so that differences have names."""
    return "{" + ", ".join(f"{call!r}: {call}" for call in calls) + "}"


def _place_of(layer: str) -> tuple[object, str]:
    match = re.match(r"(nn|O)\.(\w+)", layer)
    assert match is not None
    return (nn if match[1] == "nn" else torchvision.ops), match[2]
