"""Channel dimensions of weights, inputs and outputs, and the check of ``granularity`` against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX
from nni.compression.utils.scaling import Scaling
from torch import Tensor, nn

from nni_jackpot.errors import ConfigListError
from nni_jackpot.modules.layouts import is_transposed


def check_granularity(name: str, module: nn.Module, parameter: Tensor, setting: Mapping[str, Any]) -> None:
    """Raise ConfigListError for a granularity that a parameter cannot have."""
    granularity = setting.get("granularity")
    if granularity in (None, "default", "out_channel", "in_channel"):
        order = ("in_channel", "out_channel") if is_transposed(module) else ("out_channel", "in_channel")
        channels = order.index(granularity) + 1 if granularity in order else 0
        if parameter.dim() < channels:
            raise ConfigListError(f"{name} has {parameter.dim()} dimension(s), no {granularity}")
        if channels and is_transposed(module) and getattr(module, "groups", 1) > 1:
            raise ConfigListError(
                f"{name}: granularity={granularity!r} is not supported for transposed convolutions with "
                "groups, whose weights have no dimension of output channels"
            )
        return
    if granularity == "per_channel":
        raise ConfigListError(f"{name}: granularity='per_channel' is for inputs and outputs")
    _scaling_of_blocks(name, granularity, parameter.dim())


def _scaling_of_blocks(name: str, granularity: Sequence[Any], most: int | None = None) -> Scaling:
    """Parse a list of block sizes as NNI does, but report a bad one before it is used."""
    parts: list[Any] = list(granularity)
    if all(isinstance(step, int) for step in parts):
        parts = [parts]
    if len(parts) <= 3:
        kernel, mode, padding = parts + [None, "front", 1][len(parts) :]
        if (
            isinstance(kernel, list | tuple)
            and 0 < len(kernel) <= (len(kernel) if most is None else most)
            and all(type(step) is int and (step == -1 or step > 0) for step in [*kernel, padding])
            and mode in ("front", "back")
        ):
            return Scaling(list(kernel), mode, padding)
    number = "" if most is None else f"at most {most} "
    raise ConfigListError(
        f"{name}: granularity={granularity!r} must be a list of {number}block sizes, "
        "each positive or -1, or [such a list, 'front' or 'back', padding]"
    )


def steps_of(scaling: Scaling, dims: int) -> list[int]:
    """Return NNI's block sizes for ``dims`` dimensions; -1 is the whole length of a dimension."""
    return scaling._padding(
        scaling.kernel_size, dims, scaling.kernel_padding_val, cast(Any, scaling.kernel_padding_mode)
    )


class Channels(NamedTuple):
    """The channels (or features) of a module's input or output."""

    dim: int
    """The dimension of the channels."""
    number: int
    ranks: Sequence[int]
    """The possible numbers of dimensions."""


def channels_of(module: nn.Module, target: str) -> Channels | None:
    """Return the channels of an input or output; None if the module is not a PyTorch type known here."""
    kind, way = type(module), "in" if target.startswith(INPUT_PREFIX) else "out"
    if not kind.__module__.startswith("torch."):
        return None
    if isinstance(module, nn.Linear):
        return Channels(-1, getattr(module, f"{way}_features"), range(2, 6))
    if isinstance(module, nn.modules.conv._ConvNd):
        return Channels(1, getattr(module, f"{way}_channels"), [module.weight.dim()])
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        ranks = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,)}
        return Channels(1, module.num_features, ranks.get(kind.__name__, range(2, 6)))
    if isinstance(module, nn.Embedding):
        return Channels(-1, module.embedding_dim, range(2, 6))
    return None


def scaling_of(name: str, module: nn.Module, target: str, setting: Mapping[str, Any]) -> Scaling | None:
    """Return the layout of the mask of an input or output; None leaves the layout to NNI.

    No granularity means ``per_channel``, along the actual channel dimension: NNI always takes dimension 1,
    which is the sequence length if a linear layer processes sequences.

    Raises
    ------
    ConfigListError
        If inputs and outputs, or this one, cannot have the granularity or ``align`` of the setting.
    """
    granularity, dims = setting.get("granularity"), setting["align"]["dims"]
    advice = "leave granularity out, or write 'per_channel'"
    blocks = None
    if granularity not in (None, "default", "per_channel"):
        if isinstance(granularity, str):
            raise ConfigListError(f"{name}: granularity={granularity!r} is for weights: {advice}")
        blocks = _scaling_of_blocks(name, granularity)
    channels = channels_of(module, target)
    if channels is None:
        steps = [-1, 1] if blocks is None else blocks.kernel_size
        spans_batch = blocks is None or -1 in (*steps, blocks.kernel_padding_val)
        if granularity is not None and (not spans_batch or len(steps) - steps.count(-1) != len(dims)):
            raise ConfigListError(
                f"{name}: granularity={granularity!r} must be -1, along the batch too, but along as many "
                f"dimensions as align has dims, {dims}"
            )
        return None
    if target not in (f"{INPUT_PREFIX}0", f"{OUTPUT_PREFIX}0"):
        raise ConfigListError(
            f"{name}: a {type(module).__name__} has no more than {INPUT_PREFIX}0 and {OUTPUT_PREFIX}0"
        )
    if isinstance(module, nn.Embedding) and target.startswith(INPUT_PREFIX):
        raise ConfigListError(
            f"{name}: the input of an embedding is indices, to which no mask can be applied"
        )
    if len(dims) != 1:
        raise ConfigListError(f"{name}: align must name one of its source's dims, the channels, got {dims}")
    step = 1 if blocks is None else _step_along(channels, blocks)
    if step is None:
        raise ConfigListError(
            f"{name}: granularity={granularity!r} is not by channel, which is dimension {channels.dim} here: "
            f"{advice}"
        )
    return Scaling([-1, step], "back", -1) if channels.dim == 1 else Scaling([step], "front", -1)


def _step_along(channels: Channels, blocks: Scaling) -> int | None:
    """Return the number of channels per block; None if blocks do not consist of channels."""
    for rank in channels.ranks:
        if len(blocks.kernel_size) <= rank:
            steps = steps_of(blocks, rank)
            step = steps.pop(channels.dim)
            if step != -1 and set(steps) <= {-1}:
                return step
    return None
