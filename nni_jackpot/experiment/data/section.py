"""The section ``data`` of a run's YAML file: one dataclass for images, one for text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nni_jackpot.experiment.data.preprocess import Inputs, Preprocess, given_names
from nni_jackpot.experiment.data.spec import DATASETS, DatasetSpec
from nni_jackpot.experiment.schema.plugins import FUNCTION
from nni_jackpot.experiment.schema.rules import PATH, Invalid
from nni_jackpot.runtime.settings import between, one_of, option, shown

_MOST = 10**9
_BATCH, _EVAL_BATCH, _WORKERS = between(2, 10**6), between(1, 10**6), between(0, 256)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The data set and its batches."""

    name: str = option("data set", one_of(DATASETS))
    root: str | None = option("folder of the data set's files, null for its usual place", PATH, None)
    batch_size: int = option("images or sequences per training batch", _BATCH, 64)
    eval_batch_size: int = option("images or sequences per test batch", _EVAL_BATCH, 512, affects="accuracy")
    workers: int = option(
        "processes that load data, 0 to load in the main process", _WORKERS, 0, affects="nothing"
    )

    @staticmethod
    def choose(raw: Mapping[str, Any]) -> type[DataSection]:
        """Return the dataclass of a section: that of images, or of text."""
        name = raw.get("name")
        is_text = isinstance(name, str) and name in DATASETS and DATASETS.find(name).is_text
        return TextConfig if is_text else DataConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataSection):
    """The data set and its batches."""

    download: bool = option("whether missing files are downloaded", default=False, affects="nothing")
    train_images: int | None = option(
        "number of training images used, the same ones at every seed; null for all",
        between(2, _MOST),
        None,
    )
    validation_images: int | None = option(
        "number of training images set aside, the same ones at every seed, and tested on in place of the "
        "test images, for choosing settings; null for none",
        between(1, _MOST),
        None,
    )
    image_size: int | None = option(
        "height and width of the images in pixels, null for the data set's own, or the network's for files",
        between(1, 4096),
        None,
    )
    augment: bool = option(
        "whether training images are shifted, cropped and mirrored at random, as is usual for the data set",
        default=False,
    )
    preprocess: Preprocess | None = option(  # noqa: RUF009
        "how image files become inputs of the network, null for what the network was made for; of data sets "
        "in memory mean and std alone, null for those of the training images",
        default=None,
    )
    transform: str | None = option(
        "function from a PIL image in RGB to a float tensor (C, H, W), in place of preprocess", FUNCTION, None
    )
    loader: str | None = option(
        "function that returns (training data, test data, number of classes), for name: own",
        FUNCTION,
        None,
    )

    def __post_init__(self) -> None:
        if self.name not in DATASETS:  # of a finished run whose plugin is not imported
            return
        spec = DATASETS.find(self.name)
        self._check_functions(spec)
        if spec.root and self.root is None:
            raise Invalid("root", f"found {shown(None)}, allowed: {spec.root}")
        if self.download and not spec.downloadable:
            others = ", ".join(name for name in DATASETS if DATASETS.find(name).downloadable)
            wanted = f"false for {self.name}, true for {others}"
            raise Invalid("download", f"found {shown(True)}, allowed: {wanted}")

    def _check_functions(self, spec: DatasetSpec) -> None:
        """Refuse values that would do nothing for the data set, or beside a function of the user's."""
        if spec.by_function != (self.loader is not None):
            wanted = "module:function" if spec.by_function else "null, or name: own"
            raise Invalid("loader", f"found {shown(self.loader)}, allowed for {self.name}: {wanted}")
        if self.transform is not None and not spec.in_files:
            raise Invalid(
                "transform",
                f"found {self.transform}, allowed: null for {self.name}, which has no files",
            )
        by = "loader" if self.loader else "transform" if self.transform else ""
        for name in ("image_size", "augment", "preprocess") if by else ():
            if (value := getattr(self, name)) not in (None, False):
                raise Invalid(name, f"found {shown(value)}, allowed: nothing beside {by}")
        channels = 3 if spec.shape is None else spec.shape[0]
        for name in ("mean", "std"):
            if len(values := getattr(self.preprocess, name, None) or ()) > channels:
                wanted = f"1 number for the images of {self.name}"
                raise Invalid(f"preprocess.{name}", f"found {len(values)} numbers, allowed: {wanted}")
        if not by and not spec.in_files:
            for name in {*given_names(self.preprocess)} - {"mean", "std"}:
                raise Invalid(
                    f"preprocess.{name}", f"found a value, allowed: null for {self.name}, which has no files"
                )

    @property
    def is_in_files(self) -> bool:
        """Whether images are files that `preprocess` is about."""
        return self.transform is None and self.name in DATASETS and DATASETS.find(self.name).in_files

    @property
    def says_inputs(self) -> bool:
        """Whether all values of the preprocessing are given, so that the network need not be asked."""
        return self.image_size is not None and len(given_names(self.preprocess)) == len(fields(Preprocess))

    def for_network(self, inputs: Inputs) -> DataConfig:
        """Return the section with the preprocessing that a network was made for, where none is given."""
        try:
            size, preprocess = inputs.with_given(self.image_size, self.preprocess)
        except Invalid as error:
            raise Invalid(f"data.preprocess.{error.key}", error.text) from None
        return replace(self, image_size=size, preprocess=preprocess)


def seen_by(data: DataSection) -> dict[str, Any]:
    """Return the given settings that say how images become inputs of the network; none for text."""
    found = {name: getattr(data, name, None) for name in ("image_size", "preprocess", "transform", "loader")}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TextConfig(DataSection):
    """Text in sequences of tokens, for networks of transformers, whose tokenizer makes the tokens."""

    root: str | None = option(
        "file or folder of text (.txt, .md, .html), null for Debian's handbook", PATH, None
    )
    batch_size: int = option("sequences per training batch", _BATCH, 4)
    eval_batch_size: int = option("sequences per test batch", _EVAL_BATCH, 4, affects="accuracy")
    tokens: int = option("tokens of a sequence", between(2, 10**6), 256)
    sequences: int | None = option("number of training sequences used; null for all", between(1, _MOST), None)
    test_sequences: int = option(
        "number of sequences to test on, the same ones at every seed; as many others are for validation",
        between(1, _MOST),
        24,
    )
    validation: bool = option(
        "whether the validation sequences are tested on in place of the test sequences, to choose settings",
        default=False,
    )
