from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.transforms import InterpolationMode, v2

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.data.loading import load_data
from nni_jackpot.experiment.data.section import DataConfig

RUN = {
    "output": "runs/x",
    "pretrain": {"epochs": 2, "lr": 0.1},
    "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}],
    "search": {"epochs": 3},
    "finetune": {"epochs": 0},
}


def written(folder: Path, **sections: Any) -> Path:
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({**RUN, "model": {}, **sections}))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of four images of other sizes, in two classes."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for j in range(2):
                pixels = rng.integers(256, size=(40 + 9 * i, 33 + 20 * j, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{j}.png")
    return tmp_path / "images"


def config_of(folder: Path, model: dict[str, Any], **data: Any) -> RunConfig:
    data = {"name": "image_folder", "root": str(folder), "batch_size": 2, **data}
    return load_config(written(folder.parent, data=data, model=model))


def seen(config: RunConfig) -> Tensor:
    """Return the test images as the network gets them."""
    assert isinstance(config.data, DataConfig)
    ((batch, _),) = load_data(config.data, 0).test
    return batch


def through(folder: Path, transform: Any) -> Tensor:
    """Return the same images through a transform."""
    paths = sorted((folder / "val").rglob("*.png"))
    return torch.stack([transform(Image.open(path)) for path in paths])


@pytest.mark.parametrize(
    ("name", "weights"),
    [("resnet18", "IMAGENET1K_V1"), ("resnet50", None), ("efficientnet_b0", None), ("inception_v3", None)],
)
def test_torchvisions_networks_see_what_their_weights_want(
    images: Path, name: str, weights: str | None
) -> None:
    config = config_of(images, {"name": f"torchvision/{name}", "weights": weights})
    reference = get_model_weights(name)[weights or "DEFAULT"].transforms()
    assert torch.allclose(seen(config), through(images, reference), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "tf_mixnet_s"])
def test_timms_networks_see_what_timm_says(images: Path, name: str) -> None:
    settings = resolve_data_config({}, model=timm.create_model(name))
    reference = create_transform(**settings, is_training=False)
    assert torch.allclose(
        seen(config_of(images, {"name": f"timm/{name}"})), through(images, reference), atol=1e-5
    )


def test_given_values_replace_the_networks(images: Path) -> None:
    given = {
        "resize": 30,
        "crop": "squash",
        "interpolation": "nearest",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5],
    }
    config = config_of(images, {"name": "timm/resnet18"}, image_size=24, preprocess=given)
    reference = v2.Compose(
        [
            v2.Resize([30, 30], InterpolationMode.NEAREST),
            v2.CenterCrop(24),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]),
        ]
    )
    assert torch.allclose(seen(config), through(images, reference), atol=1e-5)


def test_another_size_keeps_the_share_that_is_cut_off(images: Path) -> None:
    config = config_of(images, {"name": "torchvision/resnet18"}, image_size=112)
    assert isinstance(config.data, DataConfig)
    assert config.data.preprocess is not None
    assert config.data.preprocess.resize == 128


def test_a_function_sees_the_images(images: Path) -> None:
    (images.parent / "of_mine.py").write_text(
        "from torchvision.transforms import v2\n"
        "to_tensor = v2.Compose([v2.Resize((8, 16)), v2.ToImage(), v2.ToDtype(__import__('torch').float32, scale=True)])\n"
        "def broken(image):\n    raise KeyError('x')\n"
        "def ragged(image):\n    return v2.functional.to_image(image).float()\n"
    )
    config = config_of(images, {}, transform="of_mine:to_tensor")
    assert isinstance(config.data, DataConfig)
    assert config.data.preprocess is None
    data = load_data(config.data, 0)
    assert data.shape == (3, 8, 16)
    reference = v2.Compose([v2.Resize((8, 16)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    assert torch.allclose(seen(config), through(images, reference))
    for name, words in (
        ("broken", "cannot be transformed: KeyError: 'x'"),
        ("ragged", "all must have one shape"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            seen(config_of(images, {}, transform=f"of_mine:{name}"))


def test_images_in_memory_take_another_mean(tmp_path: Path) -> None:
    path = written(tmp_path, data={"name": "digits"})
    usual, own = (
        seen(load_config(path, {"data.name": "digits", "data.preprocess": given}))
        for given in (None, {"mean": [0.01], "std": [0.02]})
    )
    pixels = own * 0.02 * 255 + 0.01 * 255
    assert torch.allclose(pixels, pixels.round(), atol=1e-4)
    assert not torch.allclose(usual, own)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"preprocess": {"mean": [1, 2]}},
            "data.preprocess.mean: found [1, 2] (list), allowed: null or a list of 1 or 3",
        ),
        ({"preprocess": {"std": [0]}}, "numbers > 0"),
        ({"preprocess": {"size": 3}}, "unknown key 'size', allowed: resize, crop"),
        (
            {"preprocess": {"resize": 100}},
            "data.preprocess.resize: found 100, allowed: >= image_size, which is 224",
        ),
        ({"preprocess": {"crop": "left"}}, "out of center, squash"),
        ({"transform": "nothing"}, "of the form module:function"),
        ({"transform": "no_such_module:f"}, "data.transform: cannot import 'no_such_module'"),
        (
            {"transform": "math:nothing"},
            "data.transform: found math:nothing, but math has no function nothing",
        ),
        (
            {"transform": "math:floor", "augment": True},
            "data.augment: found True (bool), allowed: nothing beside",
        ),
        ({"loader": "math:floor"}, "data.loader: found 'math:floor' (str), allowed for image_folder: null"),
        (
            {"name": "own", "root": None},
            "data.loader: found None (NoneType), allowed for own: module:function",
        ),
        (
            {"name": "digits", "preprocess": {"resize": 9}},
            "data.preprocess.resize: found a value, allowed: null for digits",
        ),
        (
            {"name": "digits", "preprocess": {"mean": [0, 0, 0]}},
            "data.preprocess.mean: found 3 numbers, allowed: 1",
        ),
        (
            {"name": "digits", "transform": "math:floor"},
            "data.transform: found math:floor, allowed: null for digits",
        ),
    ],
)
def test_values_that_will_not_do(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    path = written(tmp_path, data={"name": "image_folder", "root": "x", **data})
    with pytest.raises(ExperimentConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
