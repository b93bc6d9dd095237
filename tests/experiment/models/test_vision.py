"""Image classifiers of transformers from folders that are not trusted, and what their processors do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vision import save_classifier, tiny_classifier

from nni_jackpot.errors import CheckpointError, ExperimentConfigError
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.models.section import TransformersConfig
from nni_jackpot.experiment.models.vision import inputs_of_folder, load_image_classifier

transformers = pytest.importorskip("transformers")


def load(folder: Path, **options: object):
    return load_image_classifier(TransformersConfig(name=f"transformers/{folder}"), **options)


@pytest.mark.parametrize("kind", ["ViT", "ResNet", "ConvNext"])
def test_a_folder_is_its_network(kind: str, tmp_path: Path) -> None:
    found = load(save_classifier(tmp_path, kind), num_classes=2, classes=("cat", "dog"))
    own = tiny_classifier(kind).state_dict()
    assert found.network.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in found.network.state_dict().items())
    assert not found.network.training
    assert found.inputs.size == 24


PROCESSORS = {
    "squash": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    "crop": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    ),
    "share": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 32}),
    "levit": lambda: transformers.LevitImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    ),
    "as it is": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_settings_do_what_the_image_processor_does(name: str, tmp_path: Path) -> None:
    processor = PROCESSORS[name]()
    processor.save_pretrained(save_classifier(tmp_path))
    size, preprocess = inputs_of_folder(f"transformers/{tmp_path}")
    pixels = np.random.default_rng(1).integers(0, 256, (70, 110, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mean, std = (values.view(-1, 1, 1) for values in preprocess.normalisation())
    found = (preprocess.transform(size)(image) - mean) / std
    wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    assert ((found - wanted).abs() * std).mean() < 1  # a level of 255


def test_a_processor_that_does_more_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    for processor in (
        transformers.ViTImageProcessor(size={"height": 24, "width": 32}),
        transformers.ViTImageProcessor(do_rescale=False),
        transformers.ViTImageProcessor(size={"height": 10**6, "width": 10**6}),  # terabytes
        transformers.ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=1e-6),
    ):
        processor.save_pretrained(tmp_path)
        with pytest.raises(ExperimentConfigError, match=r"data\.transform: found null, .*module:function"):
            inputs_of_folder(f"transformers/{tmp_path}")


def write(folder: Path, network: Path, **data: object) -> Path:
    content = {
        "output": str(folder / "out"),
        "data": {"name": "image_folder", "root": str(folder), **data},
        "model": {"name": f"transformers/{network}"},
        "preset": "weights",
        "sparsity": 0.5,
        "search": {"epochs": 1},
    }
    path = folder / "run.yml"
    path.write_text(json.dumps(content))
    return path


def test_without_a_processor_all_values_are_to_be_given(tmp_path: Path) -> None:
    network = save_classifier(tmp_path / "network")
    (network / "preprocessor_config.json").unlink()
    with pytest.raises(ExperimentConfigError, match=r"data\.preprocess: .*no preprocessor_config\.json"):
        load_config(write(tmp_path, network))
    given = {"resize": 24, "crop": "squash", "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    config: RunConfig = load_config(write(tmp_path, network, image_size=24, preprocess=given))
    assert config.data.image_size == 24


def test_settings_of_text_are_refused_for_images(tmp_path: Path) -> None:
    network = save_classifier(tmp_path / "network")
    for key, value in (("task", "embeddings"), ("file", "x.gguf")):
        with pytest.raises(ExperimentConfigError, match=rf"model\.{key}: found .*, allowed for images: null"):
            load_config(write(tmp_path, network), {f"model.{key}": value})
    with pytest.raises(ExperimentConfigError, match="pretrain: found a training"):
        load_config(write(tmp_path, network), {"pretrain.epochs": 1, "pretrain.lr": 0.1})


def test_classes_must_be_those_of_the_data(tmp_path: Path) -> None:
    save_classifier(tmp_path, classes=3)
    with pytest.raises(CheckpointError, match=r"3 classes, and the data 2.*a new one would know nothing"):
        load(tmp_path, num_classes=2)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "dog", "1": "cat", "2": "emu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load(tmp_path, num_classes=3, classes=("ape", "cat", "dog"))
    with pytest.raises(CheckpointError, match="its output 0 is dog, and the data's is cat"):
        load(tmp_path, num_classes=3, classes=("cat", "dog", "emu"))


def test_a_network_without_a_classifier_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    tiny_classifier().vit.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks weights of ViTForImageClassification: classifier\."):
        load(tmp_path)


def test_pickles_and_code_are_not_read(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        own = {"auto_map": {"AutoConfig": "own.Own", "AutoImageProcessor": "own.Own"}}
        own |= {"model_type": "own"} if name == "config.json" else {"image_processor_type": "Own"}
        (folder / name).write_text(json.dumps(content | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)
    with pytest.raises(ExperimentConfigError, match=r"data\.preprocess"):
        inputs_of_folder(f"transformers/{folder}")
    assert not (tmp_path / "ran").exists()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, which can run code"):
        load(folder)
