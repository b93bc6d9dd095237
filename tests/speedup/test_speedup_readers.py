"""Sparse layers work in models that read a layer's weight instead of calling the layer, or do both."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_speedup import masked, state, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import apply_masks
from nni_jackpot.errors import MaskError, SpeedupError
from nni_jackpot.speedup import semi_structured, shrink, sparse_csr
from nni_jackpot.speedup.calls import Call
from nni_jackpot.speedup.outputs import check_same, outputs_of

Masks = dict[str, dict[str, Tensor]]
WORDS = torch.arange(14).view(2, 7)
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def linear_masks(model: nn.Module) -> Masks:
    """Return random masks of every linear layer."""
    generator = torch.Generator().manual_seed(0)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    return {
        name: {"weight": (torch.rand(layer.weight.shape, generator=generator) > 0.8).float()}
        for name, layer in layers.items()
    }


class Reading(nn.Module):
    """A model that reads weights in various ways, and also calls one of these layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.functional = nn.Linear(16, 16)
        self.product = nn.Linear(16, 16, bias=False)
        self.called = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids.to(self.called.weight.device)).to(self.called.weight.dtype)
        x = F.relu(F.linear(x, self.functional.weight, self.functional.bias))
        x = F.relu(x @ self.product.weight.t())
        x = F.relu(self.called(x)) + self.called.weight.sum()
        return self.head(x)


class AsksItsParameters(nn.Module):
    """A model whose only parameters are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x.to(next(self.up.parameters())))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0])


def encoder(**settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not settings)


def swin() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [2, 2], num_classes=5)


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **sizes))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    )


PADDED = {"src": X, "src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "readers of all kinds": (Reading, WORDS),
    "asks its parameters": (AsksItsParameters, X),
    "attention": (Attention, X),
    "transformer encoder": (encoder, X),
    "transformer encoder, norm first": (lambda: encoder(norm_first=True), X),
    "transformer encoder, padded": (encoder, PADDED),
    "transformer": (lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True), (X, X)),
    "swin": (swin, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))),
    "t5": (t5, {"input_ids": WORDS, "decoder_input_ids": WORDS}),
    "bert": (bert, {"attention_mask": torch.ones_like(WORDS), "input_ids": WORDS}),
    "gpt2": (gpt2, {"input_ids": WORDS, "labels": WORDS}),
}


@pytest.mark.parametrize("name", MODELS)
def test_readers_and_callers_get_what_the_masked_model_has(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make()
    masks = linear_masks(model)
    before, expected = state(model), masked(model, masks)
    for sparse in (sparse_csr(model, masks), sparse_csr(model, masks, inputs)):
        for layer in masks:
            read, dense = sparse.get_submodule(layer), expected.get_submodule(layer)
            assert torch.equal(read.weight, dense.weight)
            assert read.weight.dtype == dense.weight.dtype
            assert isinstance(read, nn.Linear)
            assert (read.in_features, read.out_features) == (dense.in_features, dense.out_features)
            assert (read.bias is None) == (dense.bias is None)
            assert not any(parameter.shape == dense.weight.shape for parameter in read.parameters())
        call = Call.to(model, inputs)
        check_same(outputs_of(expected, call), outputs_of(sparse, call), "CSR")
        own = call.on("cpu")
        with torch.inference_mode():
            sparse(*own.args, **own.kwargs)
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["transformer encoder", "asks its parameters", "attention"])
def test_gradients_of_inputs_are_right(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name][0](), X.clone().requires_grad_()
    masks = linear_masks(model)
    forms = masked(model, masks), sparse_csr(model, masks)
    found, expected = (torch.autograd.grad(form(x).square().sum(), x)[0] for form in forms)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_attention_alone_has_nothing_that_could_be_sparse() -> None:
    attention = nn.MultiheadAttention(16, 2)
    masks = {"": {"in_proj_weight": torch.ones(48, 16).tril()}, "out_proj": {"weight": torch.eye(16)}}
    with pytest.raises(MaskError, match="all would stay dense"):
        sparse_csr(attention, masks)


def test_a_layer_by_itself_and_any_number_of_rows() -> None:
    linear, convolution = nn.Linear(8, 6), nn.Conv2d(8, 6, 1, stride=(2, 1))
    masks = {"": {"weight": (torch.rand(6, 8) > 0.5).float()}}
    sparse = sparse_csr(linear, masks, torch.randn(2, 8))
    for shape in [(8,), (0, 8), (1, 8), (2, 3, 4, 8), (2, 0, 8)]:
        x = torch.randn(shape)
        torch.testing.assert_close(sparse(x), masked(linear, masks)(x))
    masks[""]["weight"] = masks[""]["weight"].view(6, 8, 1, 1)
    sparse = sparse_csr(convolution, masks, torch.randn(2, 8, 4, 4))
    assert torch.equal(sparse.weight, masked(convolution, masks).weight)
    for shape in [(8, 4, 5), (0, 8, 4, 5), (2, 8, 4, 5)]:
        x = torch.randn(shape)
        torch.testing.assert_close(sparse(x), masked(convolution, masks)(x))


def test_a_layer_of_two_names_is_one_layer() -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    mask = torch.eye(16)
    for names in (["0"], ["2"], ["0", "2"]):
        masks = {name: {"weight": mask} for name in names}
        sparse = sparse_csr(model, masks, X)
        assert sparse[0] is sparse[2]
        torch.testing.assert_close(sparse(X), masked(model, masks)(X))


def test_hooks_stay() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    masks = linear_masks(model)
    torch.testing.assert_close(sparse_csr(model, masks, X)(X), masked(model, masks)(X))


def test_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    masks = linear_masks(model)
    sparse = sparse_csr(model, masks)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = sparse(X), masked(model, masks)(X)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_type_without_sparse_products_is_told_at_once(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(16, 16)).to(dtype)
    try:
        torch.addmm(
            torch.zeros(1, 1).to(dtype), torch.eye(1).to_sparse_csr().to(dtype), torch.eye(1).to(dtype)
        )
    except RuntimeError:
        with pytest.raises(SpeedupError, match=rf"1, of {dtype} on cpu, cannot be run as a sparse layer"):
            sparse_csr(model, linear_masks(model))


# --- comparison on an example


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.relu(self.up(x)))


def test_a_model_that_does_not_find_its_weights_is_refused() -> None:
    class ByName(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.get_parameter("up.weight"))

    with pytest.raises(
        SpeedupError, match=r"the model with sparse layers fails on the example input: .*weight"
    ):
        sparse_csr(ByName(), linear_masks(ByName()), X)


def test_a_model_that_computes_something_else_is_refused() -> None:
    class ByType(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if type(self.up) is nn.Linear else 2 * super().forward(x)

    with pytest.raises(SpeedupError, match="the model with sparse layers differs from the masked model by"):
        sparse_csr(ByType(), linear_masks(ByType()), X)


@pytest.mark.parametrize("kind", ["input", "state", "random", "infinite"])
def test_a_model_that_changes_what_it_is_given_is_compared_fairly(kind: str) -> None:
    class Changing(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if kind == "input":
                x.add_(1)
            if kind == "random":
                x = x + torch.rand_like(x)
            self.calls += 1
            result = super().forward(x) + (self.calls if kind == "state" else 0)
            return result.masked_fill(result > result.mean(), -torch.inf) if kind == "infinite" else result

    torch.manual_seed(0)
    model, x = Changing(), X.clone()
    random = torch.get_rng_state()
    sparse = sparse_csr(model, linear_masks(model), x)
    assert torch.equal(x, X)
    assert sparse.calls == model.calls == 0
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((X, X), r"does not fit the model's forward\(x\): too many"),
        ({"y": X}, r"the masked model fails on the example input: "),
        (X[..., :3], r"the masked model fails on the example input: .*shapes"),
        ("x", "contains no tensor"),
        ({}, "contains no tensor"),
    ],
)
@pytest.mark.parametrize("form", [sparse_csr, shrink])
def test_an_example_that_does_not_fit_is_told(form: Callable[..., Any], example: Any, message: str) -> None:
    masks = {"up": {"weight": torch.eye(8, 16)}}
    with pytest.raises(SpeedupError, match=message):
        form(Net(), masks, example)


def test_outputs_without_tensors_cannot_be_compared() -> None:
    class Telling(Net):
        def forward(self, x: Tensor) -> str:
            return str(super().forward(x))

    with pytest.raises(SpeedupError, match="gives no tensor"):
        sparse_csr(Telling(), linear_masks(Telling()), X)


def test_a_model_that_cannot_be_copied_is_told() -> None:
    model = Net()
    model.seen = model(X)  # kept, with its graph
    with pytest.raises(SpeedupError, match="the model cannot be copied"):
        sparse_csr(model, linear_masks(model))


# --- channels


def test_channels_whose_weights_are_read_are_never_silently_wrong() -> None:
    class Read(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.up(x)), self.down.weight, self.down.bias)

    kept = torch.tensor([1.0, 0] * 4)
    masks = {"up": {"weight": kept[:, None].expand(8, 16).clone(), "bias": kept}}
    with pytest.raises(SpeedupError, match="ModelSpeedup fails on this model"):
        shrink(Read(), masks, X)
    model = Net()
    small = shrink(model, masks, X)
    assert small.up.out_features == 4
    torch.testing.assert_close(small(X), masked(model, masks)(X))


# --- 2:4, emulated on a CPU


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's packed 2:4 weights multiply by their dense values."""
    packed = torch.sparse.SparseSemiStructuredTensorCUTLASS

    def multiply(self: Any, other: Tensor, *, bias: Tensor | None = None, **how: bool) -> Tensor:
        weight = self.to_dense()
        if how.get("should_transpose_dense"):
            return F.linear(other, weight, bias)
        product = weight @ other
        return product if bias is None else product + bias.unsqueeze(1)

    monkeypatch.setattr(sys.modules[semi_structured.__module__], "_check_kernels", lambda name, weight: None)
    monkeypatch.setattr(packed, "_validate_device_dim_dtype_shape", lambda weight: None)
    monkeypatch.setattr(packed, "_mm", multiply)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", packed.from_dense)


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_weights_in_the_two_of_four_pattern_are_read_as_well() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Conv2d(64, 64, 1, stride=2)
            self.read, self.called = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.point(x).mean((-2, -1))
            return F.linear(x, self.read.weight, self.read.bias) + self.called(x) * self.called.weight.sum()

    torch.manual_seed(0)
    model, x = Both().bfloat16(), torch.randn(2, 64, 4, 4).bfloat16()
    masks = {
        name: {
            "weight": torch.tensor([1.0, 0, 0, 1]).repeat(layer.weight.numel() // 4).view(layer.weight.shape)
        }
        for name, layer in model.named_children()
    }
    expected = masked(model, masks)
    for sparse in (semi_structured(model, masks), semi_structured(model, masks, [x])):
        assert isinstance(sparse.called.packed, torch.sparse.SparseSemiStructuredTensor)
        for name in masks:
            assert torch.equal(sparse.get_submodule(name).weight, expected.get_submodule(name).weight)
        with torch.no_grad():
            check_same([expected(x)], [sparse(x)], "2:4")


def test_a_copy_is_what_is_converted() -> None:
    model = Net()
    masks = linear_masks(model)
    sparse = sparse_csr(apply_masks(copy.deepcopy(model), masks), masks, X)
    assert type(model.up) is nn.Linear
    assert copy.deepcopy(sparse).up.weight.equal(sparse.up.weight)
