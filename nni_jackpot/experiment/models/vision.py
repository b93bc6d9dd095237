"""Image classifiers of transformers with their image processors, from folders of safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from nni_jackpot.errors import CheckpointError, first_few
from nni_jackpot.experiment.data.preprocess import CENTER, INTERPOLATIONS, SQUASH, Inputs, Preprocess
from nni_jackpot.experiment.models.folders import Source, config_of, loading, source_of, transformers
from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.runtime.terminal import escaped

if TYPE_CHECKING:
    from nni_jackpot.experiment.models.section import TransformersConfig

# Largest mean difference of an image, in levels of 255: libraries round resized pixels differently.
_MOST_LEVELS = 1.0
_TRIED_PIXELS = 320, 240
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class ImageClassifier:
    """A network, in evaluation mode and float32, with its image processor and what the processor does.

    The processor is None if there is none, its inputs are None if settings cannot say what it does.
    """

    network: nn.Module
    processor: Any
    inputs: Inputs | None


def load_image_classifier(
    config: TransformersConfig, num_classes: int | None = None, classes: Sequence[str] = ()
) -> ImageClassifier:
    """Load the image classifier that a config names.

    Parameters
    ----------
    config
        The network.
    num_classes
        Number of classes of the data; None for any.
    classes
        Names of the classes of the data, in the order of their labels; empty for any.

    Raises
    ------
    ExperimentConfigError
        If the folder or the package does not exist.
    CheckpointError
        If transformers cannot load the folder without running code or unpickling; if the folder has no
        weights of a classifier; or if the classifier is for another number of classes, or has the same
        classes in another order.
    MissingLibraryError
        If transformers is not installed.
    """
    source = source_of(config.name)
    with loading(config.name):
        found = config_of(source)
        if num_classes is not None and found.num_labels != num_classes:
            raise CheckpointError(
                f"model.name: {config.name} has {found.num_labels} classes, and the data {num_classes}: its "
                "classifier does not fit, and a new one would know nothing. Give the data the same classes, "
                "or train the network on the data's classes first, and name the folder of the result"
            )
        names = [str(found.id2label[i]) for i in range(found.num_labels)]
        if classes and set(names) == {*classes} and names != [*classes]:
            at = next(i for i, name in enumerate(names) if name != classes[i])
            raise CheckpointError(
                f"model.name: {config.name} has the classes of the data in another order: its output {at} is "
                f"{escaped(names[at])}, and the data's is {classes[at]}. Rename the folders of the classes, "
                "so that their alphabetical order is that of the outputs"
            )
        network, how = transformers().AutoModelForImageClassification.from_pretrained(
            source.place,
            config=found,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **source.options,
        )
        if missing := sorted(how["missing_keys"]):
            raise CheckpointError(
                f"model.name: {config.name} lacks weights of {type(network).__name__}: {first_few(missing)}. "
                "Name the folder of a trained classifier"
            )
    processor = _processor(source)
    return ImageClassifier(network.eval(), processor, _inputs_of(processor))


def inputs_of_folder(name: str) -> Inputs:
    """Return what the image processor of a network does, as settings.

    Raises
    ------
    ExperimentConfigError
        If there is no image processor, or it does more than resize, crop and normalise.
    """
    source = source_of(name)
    processor = _processor(source)
    if processor is None:
        raise Invalid(
            "data.preprocess",
            f"found too few values, allowed for {name}, which has no preprocessor_config.json: image_size "
            f"and all of {', '.join(Preprocess.__dataclass_fields__)}; or transform in their place",
        )
    found = _inputs_of(processor)
    if found is None:
        raise Invalid(
            "data.transform",
            f"found null, allowed for {name}: module:function, for its {type(processor).__name__} does more "
            "than resize, crop and normalise an image to a square",
        )
    return found


def _processor(source: Source) -> Any:
    """Return the image processor of a network; None if there is none that needs no code of the folder."""
    options = {name: value for name, value in source.options.items() if name != "gguf_file"}
    try:
        return transformers().AutoImageProcessor.from_pretrained(source.place, **options)
    except Exception:  # transformers raises the errors of its readers and of its HTTP client
        return None


def _inputs_of(processor: Any) -> Inputs | None:
    """Return what an image processor does to an image, as settings; None if it does something else."""
    if processor is None:
        return None
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*_TRIED_PIXELS, 3), dtype=np.uint8))
    try:
        if not _is_bounded(processor):
            return None
        wanted = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        return next((inputs for inputs in _possible(processor, wanted) if _same(inputs, image, wanted)), None)
    except Exception:  # of a processor whose settings do not fit one another
        return None


def _is_bounded(processor: Any) -> bool:
    """Return True if an image processor, whose file may be hostile, makes images of a sensible size."""
    sizes = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size", "pad_size"))
    sides = [side for size in sizes for side in size.values() if side is not None]
    share = getattr(processor, "crop_pct", None) or 1.0
    return all(0 < side <= _MOST_PIXELS for side in sides) and 0.1 <= share <= 1


def _possible(processor: Any, wanted: torch.Tensor) -> Iterator[Inputs]:
    """Iterate over the settings that an image processor may stand for."""
    size = wanted.shape[-1]
    how = _interpolation(getattr(processor, "resample", None))
    is_normalised = getattr(processor, "do_normalize", None)
    mean, std = (
        tuple(getattr(processor, name)) if is_normalised else default
        for name, default in (("image_mean", (0.0,)), ("image_std", (1.0,)))
    )
    sides = dict(getattr(processor, "size", None) or {})
    side = int(sides.get("shortest_edge") or sides.get("height") or size)
    share = getattr(processor, "crop_pct", None) or 1.0
    # As most processors resize; as that of ConvNeXt does; as that of LeViT does.
    for resize in dict.fromkeys((side, int(side / share), int(side * 256 / 224))):
        for crop in (SQUASH, CENTER):
            if resize >= size:
                yield Inputs(
                    size, Preprocess(resize=resize, crop=crop, interpolation=how, mean=mean, std=std)
                )


def _interpolation(resample: Any) -> str:
    """Return the name of one of Pillow's filters, which transformers names by numbers."""
    name = Image.Resampling(int(resample)).name.lower() if resample is not None else "bilinear"
    return name if name in INTERPOLATIONS else "bilinear"


def _same(inputs: Inputs, image: Any, wanted: torch.Tensor) -> bool:
    """Return True if an image becomes the same input, up to the rounding of pixels."""
    mean, std = (values.view(-1, 1, 1) for values in inputs.preprocess.normalisation())
    found = (inputs.preprocess.transform(inputs.size)(image) - mean) / std
    if found.shape != wanted.shape:
        return False
    levels = (found - wanted).abs() * std
    return levels.mean().item() < _MOST_LEVELS
