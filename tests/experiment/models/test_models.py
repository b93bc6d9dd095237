from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from published_weights import publish
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.errors import CheckpointError, ExperimentConfigError
from nni_jackpot.experiment.models import build_model, has_new_classifier, validate_model
from nni_jackpot.experiment.models.resnet import ResNet, pad_shortcut
from nni_jackpot.experiment.models.section import ModelConfig
from nni_jackpot.experiment.models.vgg import VGG19


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", [8, 9, 28, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_output_shape(size: int, in_channels: int) -> None:
    model = ResNet(8, 4, num_classes=7, in_channels=in_channels)
    assert model(torch.randn(2, in_channels, size, size)).shape == (2, 7)


def test_stages_halve_the_image_and_double_the_channels() -> None:
    model = ResNet(8, 4, 10, 1)
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: shapes.__setitem__(name, output.shape[1:])

    for name, module in model.named_children():
        module.register_forward_hook(note(name))
    model(torch.randn(2, 1, 28, 28))
    assert [tuple(shapes[stage]) for stage in ("conv1", "stage1", "stage2", "stage3")] == [
        (4, 28, 28),
        (4, 28, 28),
        (8, 14, 14),
        (16, 7, 7),
    ]


@pytest.mark.parametrize(("depth", "layers"), [(8, 8), (14, 14), (20, 20), (32, 32)])
def test_depth_counts_the_layers_with_weights(depth: int, layers: int) -> None:
    model = ResNet(depth, 2, 10, 1)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == layers


@pytest.mark.parametrize("depth", [2, 7, 9, 18])
def test_depth_that_is_not_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 \(8, 14, 20, \.\.\.\), got {depth}"):
        ResNet(depth, 4, 10, 1)


def test_parameters_of_resnet20_are_those_of_the_paper() -> None:
    # He et al. 2016, Table 6: 0.27 M.
    assert parameters(ResNet(20, 16, 10, 3)) == 269_722


def test_shortcut_has_every_second_pixel_and_zeros() -> None:
    x = torch.randn(2, 3, 7, 8)
    y = pad_shortcut(x, 4)
    assert y.shape == (2, 7, 4, 4)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = ResNet(14, 4, 10, 1)
    F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_initial_weights_are_kaimings() -> None:
    torch.manual_seed(0)
    model = ResNet(8, 32, 10, 1)
    weight = model.get_parameter("stage3.0.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not model.fc.bias.any()


def test_activations_neither_vanish_nor_explode() -> None:
    torch.manual_seed(0)
    logits = ResNet(32, 8, 10, 1)(torch.randn(64, 1, 8, 8))
    assert 0.1 < logits.std().item() < 30


def test_traces_symbolically() -> None:
    model = ResNet(14, 4, 10, 1).eval()
    x = torch.randn(3, 1, 8, 8)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    modules = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert len(modules) == len(set(modules))


# -- VGG-19


def test_vgg19_has_the_layers_of_the_papers_on_cifar() -> None:
    model = VGG19(num_classes=10, in_channels=3)
    filters = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert filters == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == 4
    # 20,018,880 weights of convolutions, 2 x 5,504 of their norms, and the classifier's.
    assert parameters(model) == 20_018_880 + 11_008 + 5_130


@pytest.mark.parametrize(("size", "in_channels"), [(16, 1), (28, 1), (32, 3), (64, 3)])
def test_vgg19_takes_images_of_any_size(size: int, in_channels: int) -> None:
    with torch.device("meta"):
        assert VGG19(7, in_channels)(torch.zeros(2, in_channels, size, size)).shape == (2, 7)


def test_vgg19_pools_two_by_two_pixels_of_a_small_image() -> None:
    torch.manual_seed(0)
    model = VGG19(10, 3).eval()
    x = torch.randn(1, 3, 32, 32)
    features = model.features(x)
    assert features.shape == (1, 512, 2, 2)
    assert torch.allclose(model(x), model.classifier(F.avg_pool2d(features, 2).flatten(1)))
    assert 0.1 < model(x).std().item() < 30


# -- by name


def build(name: str, num_classes: int = 5, in_channels: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, **options), num_classes, in_channels)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet", 8),
        ("vgg19", 16),
        ("torchvision/mobilenet_v3_small", 32),
        ("torchvision/squeezenet1_1", 32),
        ("torchvision/regnet_x_400mf", 32),
        ("torchvision/googlenet", 64),
        ("timm/test_resnet", 32),
    ],
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_any_number_of_classes_and_channels(name: str, size: int, in_channels: int) -> None:
    model = build(name, in_channels=in_channels)
    assert all(module.training for module in model.modules())
    logits = model(torch.randn(2, in_channels, size, size))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 5)
    again = build(name, in_channels=in_channels).state_dict()
    assert all(
        torch.equal(value, again[key])
        for key, value in build(name, in_channels=in_channels).state_dict().items()
    )


def test_depth_and_width_are_the_resnets() -> None:
    model = build("resnet", depth=14, width=4)
    assert isinstance(model, ResNet)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 13
    # ResNet-32 with doubled filters, as the paper has it.
    assert parameters(build("resnet", 10, depth=32, width=32)) == pytest.approx(1.86e6, rel=0.01)


def test_torchvisions_resnet50() -> None:
    with torch.device("meta"):
        model = build("torchvision/resnet50", 1000)
    assert parameters(model) == 25_557_032


# -- published weights


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Put random weights where torch.hub keeps those of torchvision's squeezenet1_1 and shufflenet_v2_x0_5."""
    torch.manual_seed(7)
    return {name: publish(name, tmp_path, monkeypatch) for name in ("squeezenet1_1", "shufflenet_v2_x0_5")}


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_published_weights_of_torchvision(published: dict[str, dict[str, Tensor]], name: str) -> None:
    config = ModelConfig(name=f"torchvision/{name}", weights="IMAGENET1K_V1")
    state = build_model(config, 1000, 3).state_dict()
    assert all(torch.equal(value, published[name][key]) for key, value in state.items())
    assert not has_new_classifier(config, 1000)


@pytest.mark.parametrize(
    ("name", "classifier"), [("squeezenet1_1", "classifier.1"), ("shufflenet_v2_x0_5", "fc")]
)
def test_a_classifier_of_other_classes_is_new(
    published: dict[str, dict[str, Tensor]], name: str, classifier: str
) -> None:
    config = ModelConfig(name=f"torchvision/{name}", weights="IMAGENET1K_V1")
    assert has_new_classifier(config, 10)
    model = build_model(config, 10, 3)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    published_state = published[name]
    for key, value in model.state_dict().items():
        if key.startswith(classifier):
            assert value.shape == (10, *published_state[key].shape[1:])
        elif "running" not in key and "tracked" not in key:
            assert torch.equal(value, published_state[key])


def test_published_weights_are_for_three_channels(published: dict[str, Tensor]) -> None:
    config = ModelConfig(name="torchvision/squeezenet1_1", weights="IMAGENET1K_V1")
    with pytest.raises(ExperimentConfigError, match="for images of 3 channels, the dataset's have 1"):
        build_model(config, 10, 1)


def test_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, *args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    config = ModelConfig(name="torchvision/squeezenet1_1", weights="IMAGENET1K_V1")
    with pytest.raises(CheckpointError) as caught:
        build_model(config, 10, 3)
    said = str(caught.value)
    assert "IMAGENET1K_V1 of torchvision/squeezenet1_1 cannot be loaded: <urlopen error no network>" in said
    assert f"put https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth at {tmp_path}/hub" in said


def test_damaged_weights(published: dict[str, Tensor], tmp_path: Path) -> None:
    for path in (tmp_path / "hub" / "checkpoints").iterdir():
        path.write_text("hello")
    config = ModelConfig(name="torchvision/squeezenet1_1", weights="IMAGENET1K_V1")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_model(config, 10, 3)


@pytest.mark.parametrize("weights", ["default", "r160_in1k"])
def test_published_weights_of_timm(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    state = timm.create_model("test_resnet").state_dict()
    asked = []

    def fetch(place: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(place)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    config = ModelConfig(name="timm/test_resnet", weights=weights)
    assert not has_new_classifier(config, 1000)
    assert has_new_classifier(config, 10)
    whole, other = build_model(config, 1000, 3).state_dict(), build_model(config, 10, 3).state_dict()
    assert asked == ["timm/test_resnet.r160_in1k"] * 2
    assert all(torch.equal(value, state[key]) for key, value in whole.items())
    assert {key for key, value in other.items() if value.shape != state[key].shape} == {
        "fc.weight",
        "fc.bias",
    }
    gray = build_model(config, 10, 1).get_parameter("conv1.0.weight")
    assert torch.allclose(gray, state["conv1.0.weight"].sum(1, keepdim=True))


def test_weights_of_timm_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(place: str, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    with pytest.raises(CheckpointError) as caught:
        build_model(ModelConfig(name="timm/test_resnet", weights="default"), 10, 3)
    assert str(caught.value) == "weights default of timm/test_resnet cannot be loaded: no network"


# -- what a network takes


def test_images_that_a_network_takes() -> None:
    config = ModelConfig(name="resnet")
    model = build("resnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state()
    validate_model(config, model, 5, (3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(states, torch.get_rng_state())


@pytest.mark.parametrize(("name", "size"), [("vgg19", 8), ("timm/vit_tiny_patch16_224", 32)])
def test_images_of_the_wrong_size(name: str, size: int) -> None:
    with pytest.raises(ExperimentConfigError) as caught:
        validate_model(ModelConfig(name=name), build(name), 5, (3, size, size))
    assert f"model.name: {name} cannot take images of 3 x {size} x {size}: " in str(caught.value)
    assert str(caught.value).endswith("Set data.image_size to what it takes")


def test_outputs_that_are_no_logits() -> None:
    with pytest.raises(ExperimentConfigError, match="resnet gives no logits of 6 classes"):
        validate_model(ModelConfig(name="resnet"), build("resnet"), 6, (3, 8, 8))


@pytest.mark.parametrize("name", ["resnet", "vgg19", "torchvision/mobilenet_v3_small"])
def test_random_weights_of_one_distribution(name: str) -> None:
    def built(init: str | None) -> nn.Module:
        torch.manual_seed(0)
        return build_model(ModelConfig(name=name, init=init), 10, 3)

    own, kaiming, again, signed = (built(init) for init in (None, "kaiming", "kaiming", "signed_constant"))
    layers = 0
    for key, module in own.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            drawn, same, sign = (model.get_parameter(f"{key}.{leaf}") for model in (kaiming, again, signed))
            assert torch.equal(drawn, same)
            if leaf != "weight" or not isinstance(module, nn.Conv2d | nn.Linear):
                assert torch.equal(drawn, parameter)
                assert torch.equal(sign, parameter)
                continue
            layers += 1
            deviation = (2 / (parameter.numel() / len(parameter))) ** 0.5  # 2 / fan_in
            torch.testing.assert_close(sign, torch.copysign(torch.tensor(deviation), drawn))
            normal = drawn.flatten() / deviation
            assert normal.mean().abs() < 5 / len(normal) ** 0.5
            assert (normal.square().mean() - 1).abs() < 5 * (2 / len(normal)) ** 0.5
            assert ((normal.abs() < 1).float().mean() - 0.6827).abs() < 5 * 0.47 / len(normal) ** 0.5
    assert layers > 7
