from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from nni_jackpot.errors import DatasetNotFoundError
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.data.loading import Data, load_data
from nni_jackpot.experiment.data.section import DataConfig

RUN = {
    "output": "runs/x",
    "model": {},
    "pretrain": {"epochs": 2, "lr": 0.1},
    "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}],
    "search": {"epochs": 3},
    "finetune": {"epochs": 0},
}
MODULE = """
import torch

class Noise(list):
    def __getitem__(self, index):
        label = list.__getitem__(self, index)
        return label + torch.rand(3, 6, 5), label

def good():
    return Noise([0, 1, 2, 1]), Noise([2, 0, 1]), 3

def empty():
    return [], [], 3

def alone():
    return Noise([0, 1])

def other_label():
    return Noise([0, 3]), Noise([0]), 3

def no_tensors():
    return [("a.png", 0)], [], 2

def ragged():
    return [(torch.rand(3, 4, 4 + i), 0) for i in range(2)], Noise([0]), 1

def generator():
    return iter([]), Noise([0]), 1
"""


def data_of(folder: Path, function: str) -> Data:
    (folder / "sets_of_mine.py").write_text(MODULE)
    data = {"name": "own", "loader": f"sets_of_mine:{function}", "batch_size": 2}
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({**RUN, "data": data}))
    config = load_config(path)
    assert isinstance(config.data, DataConfig)
    return load_data(config.data, 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(__import__("sys").modules, "sets_of_mine", raising=False)
    return tmp_path


def test_a_function_makes_the_data(folder: Path) -> None:
    data = data_of(folder, "good")
    assert (data.shape, data.num_classes, data.tested) == ((3, 6, 5), 3, 3)
    ((images, labels),) = data.test
    assert labels.tolist() == [2, 0, 1]
    assert torch.equal(images.floor().flatten(1).amax(1), labels.float())
    assert sum(len(labels) for _, labels in data.train) == 4


def test_random_numbers_follow_the_batch(folder: Path) -> None:
    first, again = (data_of(folder, "good") for _ in range(2))
    before = torch.get_rng_state()
    for (one, _), (other, _) in zip(first.train, again.train, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("empty", "item 0: IndexError"),
        ("alone", "it must return .training data, test data, number of classes."),
        ("other_label", "item 1 has the label 3, allowed: 0 to 2"),
        ("no_tensors", "item 0 is not a pair of a float tensor .C, H, W. and a label"),
        ("ragged", "has an image of .3, 4, 5., item 0 of .3, 4, 4.|has an image of"),
        ("generator", "sets_of_mine:generator: TypeError"),
    ],
)
def test_data_that_will_not_do(folder: Path, function: str, words: str) -> None:
    with pytest.raises(DatasetNotFoundError, match=f"^data.loader: .*{words}"):
        list(data_of(folder, function).train)
