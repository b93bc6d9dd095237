"""The law of `law.py` for small modules of every kind, put together at random, and for what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import check_either, check_law, check_refusal
from nni.compression.base.setting import PruningSetting
from random_modules import AROUND, LAYERS, TOKENS, WIDTH, Calls, Net, build, linear, nets
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from nni_jackpot import EdgePopup

# What fails is small as it is, and takes minutes to be made smaller.
PHASES = (Phase.explicit, Phase.generate)
OF_WEIGHTS = PruningSetting.default_setting["weight"]
# What NNI does not know, but lets a user make known.
OURS: dict[str, dict[str, Any]] = {
    "MultiheadAttention": {"in_proj_weight": OF_WEIGHTS},
    "NonDynamicallyQuantizableLinear": PruningSetting.default_setting,
    "LSTM": {"weight_ih_l0": OF_WEIGHTS, "weight_hh_l0": OF_WEIGHTS},
    "Computed": {"weight": OF_WEIGHTS},
    "Subclassed": {"weight": OF_WEIGHTS},
}
OP_TYPES = [
    "Linear",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "BatchNorm1d",
    "MultiheadAttention",
    *list(OURS)[:2],
]


@pytest.fixture(scope="module", autouse=True)
def _settings_of_our_own() -> Iterator[None]:
    before = dict(PruningSetting.registry)
    for kind, setting in OURS.items():
        PruningSetting.register(kind, setting)
    yield
    PruningSetting.registry.clear()
    PruningSetting.registry.update(before)


def config_list(*op_types: str, sparse_ratio: float = 0.5) -> list[dict[str, Any]]:
    return [{"op_types": list(op_types or OP_TYPES), "sparse_ratio": sparse_ratio}]


def floats(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(2)),)


def check(net: Net, entries: list[dict[str, Any]], **options: Any) -> None:
    # PyTorch runs an encoder by a fused kernel unless a layer of the encoder has hooks.
    check_law(net.make, entries, net.inputs(), exact="encoder" not in str(net), **options)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer: str) -> None:
    check(Net(False, layer, "plain", torch.float32), config_list())


@pytest.mark.parametrize("around", AROUND)
def test_everything_around_layers(around: str) -> None:
    check(Net(False, (around, ["linear", "batch norm", "dropout"]), "plain", torch.float32), config_list())


@pytest.mark.parametrize("head", ["plain", "tied", "read"])
@pytest.mark.parametrize("op_types", [("Embedding", "Linear"), ("Embedding",), ("Linear",)])
def test_an_embedding_and_its_head(head: str, op_types: tuple[str, ...]) -> None:
    check(Net(True, "linear", head, torch.float32), config_list(*op_types))


@given(
    net=nets(torch.float64, torch.float32, torch.bfloat16),
    sparse_ratio=st.sampled_from([0.3, 0.5, 0.9]),
    embeddings=st.booleans(),
    options=st.sampled_from([{}, {"init": "random"}, {"method": EdgePopup.paper()}]),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=PHASES)
def test_any_module(net: Net, sparse_ratio: float, embeddings: bool, options: dict[str, Any]) -> None:
    op_types = [*OP_TYPES, "Embedding"] if embeddings or net.head == "read" else OP_TYPES
    check(net, config_list(*op_types, sparse_ratio=sparse_ratio), **options)


def test_a_layer_that_is_the_model() -> None:
    check_law(linear, config_list(), floats(4, WIDTH))


def test_a_weight_whose_channels_are_last_in_memory() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)

    check_law(
        make, config_list(), (floats(2, 4, 8, 8)[0].to(memory_format=torch.channels_last),), exact=False
    )


def test_a_weight_whose_rows_are_columns_in_memory() -> None:
    def make() -> nn.Module:
        layer = linear()
        layer.weight = nn.Parameter(layer.weight.detach().T)
        return nn.Sequential(layer, nn.Tanh(), linear())

    check_law(make, config_list(), floats(4, WIDTH))


def _two_parameters_of_one_memory() -> nn.Module:
    first, second = linear(), linear()
    second.weight.data = first.weight.data
    return nn.Sequential(first, second)


def _one_number_for_a_row() -> nn.Module:
    layer = linear()
    layer.weight = nn.Parameter(torch.randn(WIDTH, 1).expand(WIDTH, WIDTH))
    return layer


def _part_of_another() -> nn.Module:
    whole, part = nn.Linear(WIDTH, 2 * WIDTH), linear()
    part.weight = nn.Parameter(whole.weight.detach()[:WIDTH])
    return Calls(lambda x, whole, part: whole(part(x)), whole, part)


def _also_a_buffer() -> nn.Module:
    layer = linear()
    layer.register_buffer("read", layer.weight.detach())
    return Calls(lambda x, layer: F.linear(layer(x), layer.read), layer)


def _in_a_list_of_parameters() -> nn.Module:
    layer = linear()
    weights = nn.ParameterList([layer.weight])
    return Calls(lambda x, layer, weights: F.linear(layer(x), weights[0]), layer, weights)


def _one_of_two_is_parametrized() -> nn.Module:
    first, second = linear(), linear()
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), parametrizations.weight_norm(second))


def _in_a_module_that_the_model_does_not_know() -> nn.Module:
    layer, unknown = linear(), linear()
    unknown.weight = layer.weight
    layer.hidden = [unknown]
    return Calls(lambda x, layer: layer.hidden[0](layer(x)), layer)


class Subclassed(nn.Module):
    """Requires a keyword from each subclass."""

    def __init_subclass__(cls, *, word: str) -> None:
        super().__init_subclass__()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize(
    "make",
    [
        _two_parameters_of_one_memory,
        _one_number_for_a_row,
        _part_of_another,
        _also_a_buffer,
        _in_a_list_of_parameters,
        _one_of_two_is_parametrized,
        _in_a_module_that_the_model_does_not_know,
        Subclassed,
    ],
)
def test_a_weight_that_is_hard_to_mask_is_searched_by_the_law_or_refused(
    make: Callable[[], nn.Module],
) -> None:
    check_either(make, config_list("Linear", "Subclassed"), floats(4, WIDTH))


# -- what is refused


class Computed(nn.Module):
    """Has a weight that is a property."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH))

    @property
    def weight(self) -> Tensor:
        return self.raw.exp()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def _buffer() -> nn.Module:
    layer = linear()
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


def _pruned_convolution() -> nn.Module:
    convolution = prune.random_structured(nn.Conv1d(WIDTH, WIDTH, 1), "weight", amount=2, dim=0)
    return Calls(lambda x, layer: layer(x.mT).mT, convolution)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "weight norm, as it was": lambda: weight_norm(linear()),
    "spectral norm, as it was": lambda: spectral_norm(linear()),
    "pruned by its size": lambda: prune.l1_unstructured(linear(), "weight", amount=0.5),
    "made ready to be pruned": lambda: prune.identity(linear(), "weight"),
    "pruned in channels": _pruned_convolution,
    "a buffer": _buffer,
    "a property": Computed,
    "flat weights": lambda: Calls(lambda x, layer: layer(x)[0], nn.LSTM(WIDTH, WIDTH, batch_first=True)),
}
WITHOUT_VALUES: dict[str, Callable[[], nn.Module]] = {
    "lazy": lambda: nn.LazyLinear(WIDTH),
    "meta": lambda: nn.Linear(WIDTH, WIDTH, device="meta"),
}
OTHERS = nets(torch.float32)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", REFUSED)
@given(others=OTHERS, comes_first=st.booleans())
@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=PHASES)
def test_a_weight_that_is_no_parameter_is_refused(kind: str, others: Net, comes_first: bool) -> None:
    def make() -> nn.Module:
        layers = [build(others.body), REFUSED[kind]()]
        return nn.Sequential(*(reversed(layers) if comes_first else layers), nn.Linear(WIDTH, 5))

    check_refusal(make, config_list(*OP_TYPES, "LSTM", "Computed"), floats(4, 3, WIDTH))


@pytest.mark.parametrize("kind", WITHOUT_VALUES)
@given(others=OTHERS)
@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=PHASES)
def test_a_weight_without_values_is_refused(kind: str, others: Net) -> None:
    def make() -> nn.Module:
        return nn.Sequential(build(others.body), WITHOUT_VALUES[kind]())

    check_refusal(make, config_list(*OP_TYPES, "LazyLinear"))


def _made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return linear()


def _of_value(change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = linear()
        layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
        return layer

    return make


UNFIT: dict[str, Callable[[], nn.Module]] = {
    "complex": _of_value(lambda weight: weight.to(torch.complex64)),
    "of whole numbers": _of_value(lambda weight: weight.to(torch.int8)),
    "of eight bits": _of_value(lambda weight: weight.to(torch.float8_e4m3fn)),
    "sparse": _of_value(Tensor.to_sparse),
    "not a number": _of_value(lambda weight: weight.index_fill(0, torch.tensor([1]), float("nan"))),
    "infinite": _of_value(lambda weight: weight.index_fill(0, torch.tensor([1]), float("inf"))),
    "made for inference": _made_for_inference,
    "changed by every forward": lambda: nn.Embedding(TOKENS, WIDTH, max_norm=1.0),
    "of sparse gradients": lambda: nn.Embedding(TOKENS, WIDTH, sparse=True),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_weight_without_scores_is_refused(kind: str) -> None:
    check_refusal(lambda: nn.Sequential(linear(), UNFIT[kind]()), config_list("Linear", "Embedding"))
