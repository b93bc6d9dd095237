"""The section ``model`` of a run's YAML file: one dataclass for folders of transformers, one for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nni_jackpot.experiment.models import model_names, weights_names
from nni_jackpot.experiment.models.folders import TRANSFORMERS
from nni_jackpot.experiment.models.initial import INITS
from nni_jackpot.experiment.models.language import TASKS
from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.runtime.registry import close_match
from nni_jackpot.runtime.settings import Rule, between, one_of, option, shown

_NOT_EMPTY = Rule("that is not empty", lambda value: len(value) > 0)
# The deepest network is that of He et al. (2016, "Deep residual learning", Sec. 4.2).
_RESNET_DEPTH = Rule(
    "of the form 6n+2: 8, 14, 20, ..., 1202", lambda value: 8 <= value <= 1202 and value % 6 == 2
)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The network, and the weights that it has before any training."""

    name: str = option("architecture, or transformers/ and a folder", _NOT_EMPTY, "resnet")

    @staticmethod
    def choose(raw: Mapping[str, Any]) -> type[ModelSection]:
        """Return the dataclass of a section: that of a folder of transformers, or of other networks."""
        return TransformersConfig if str(raw.get("name")).startswith(TRANSFORMERS) else ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSection):
    """The network, and the weights that it has before any training."""

    depth: int = option("layers with weights of the resnet", _RESNET_DEPTH, 8)
    width: int = option("filters of the resnet's first stage", between(1, 1024), 16)
    weights: str | None = option(
        "published weights of a torchvision or timm network, null for random ones", _NOT_EMPTY, None
    )
    init: str | None = option(
        "distribution of random weights, null for the network's own", one_of(INITS), None
    )
    channels_last: bool = option(
        "whether channels are adjacent in memory, which is faster for some networks", default=False
    )

    def __post_init__(self) -> None:
        names = model_names(self.name)
        if self.name not in names:
            wanted = "resnet, vgg19, torchvision/NAME, timm/NAME, transformers/FOLDER"
            wanted += close_match(self.name, names)
            raise Invalid("name", f"found {shown(self.name)}, allowed: {wanted}")
        weights = weights_names(self.name)
        if self.weights is not None and self.weights not in weights:
            wanted = f"for {self.name} {', '.join(['null', *weights])}"
            raise Invalid("weights", f"found {shown(self.weights)}, allowed: {wanted}")
        for size in ("depth", "width"):
            if (value := getattr(self, size)) != (
                usual := getattr(ModelConfig, size)
            ) and self.name != "resnet":
                raise Invalid(
                    size, f"found {value}, allowed: {usual} for {self.name}, whose size its name says"
                )
        if self.init is not None and self.weights is not None:
            wanted = f"null beside weights, which are {self.weights}"
            raise Invalid("init", f"found {shown(self.init)}, allowed: {wanted}")


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(ModelSection):
    """A pre-trained network of transformers, of text or of images; no code in its files is run."""

    name: str = option(
        "transformers/FOLDER; transformers/package:NAME/FOLDER for a folder in an installed Python package; "
        "or transformers/ID of the Hugging Face hub",
        _NOT_EMPTY,
    )
    task: str | None = option(
        "what a network of text computes, null for what its files say", one_of(TASKS), None
    )
    file: str | None = option(
        "GGUF file of a network of text in the folder, null for the only one", _NOT_EMPTY, None
    )
