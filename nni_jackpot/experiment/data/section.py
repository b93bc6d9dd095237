"""The section ``data`` of a run's YAML file."""

from __future__ import annotations

from dataclasses import dataclass

from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.schema.rules import PATH, Invalid
from nni_jackpot.runtime.settings import between, one_of, option, shown

_MOST_IMAGES = 10**9


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set and its batches."""

    name: str = option("data set", one_of(DATASETS))
    root: str | None = option("folder of the data set's files, null for its usual place", PATH, None)
    download: bool = option("whether missing files are downloaded", default=False, affects="nothing")
    train_images: int | None = option(
        "number of training images used, the same ones at every seed; null for all",
        between(2, _MOST_IMAGES),
        None,
    )
    validation_images: int | None = option(
        "number of training images set aside, the same ones at every seed, and tested on in place of the "
        "test images, for choosing settings; null for none",
        between(1, _MOST_IMAGES),
        None,
    )
    batch_size: int = option("images per training batch", between(2, 10**6), 64)
    eval_batch_size: int = option("images per test batch", between(1, 10**6), 512, affects="accuracy")
    image_size: int | None = option(
        "height and width of the images in pixels, null for the data set's own", between(1, 4096), None
    )
    augment: bool = option(
        "whether training images are shifted, cropped and mirrored at random, as is usual for the data set",
        default=False,
    )
    workers: int = option(
        "processes that load data, 0 to load in the main process", between(0, 256), 0, affects="nothing"
    )

    def __post_init__(self) -> None:
        if self.name not in DATASETS:  # of a finished run whose plugin is not imported
            return
        spec = DATASETS.find(self.name)
        if spec.root and self.root is None:
            raise Invalid("root", f"found {shown(None)}, allowed: {spec.root}")
        if self.download and not spec.downloadable:
            others = ", ".join(name for name in DATASETS if DATASETS.find(name).downloadable)
            wanted = f"false for {self.name}, true for {others}"
            raise Invalid("download", f"found {shown(True)}, allowed: {wanted}")
