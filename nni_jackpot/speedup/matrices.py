"""Linear layers and 1x1 convolutions: their weights are matrices, for which sparse products exist."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

from torch import Tensor, nn

from nni_jackpot.errors import MaskError, SpeedupError, first_line
from nni_jackpot.masks import Masks, apply_masks, check_shape, match_names, named_masks
from nni_jackpot.modules.parameters import join
from nni_jackpot.speedup.calls import Call, Inputs
from nni_jackpot.speedup.outputs import check_same, copy_of, outputs_of


def masked_matrices(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return the masks (out, in) of all pruned linear layers and 1x1 convolutions, by name.

    Subclasses are left out: ``nn.MultiheadAttention``, for one, never calls its projection layer.

    Raises
    ------
    MaskError
        If the masks do not have NNI's form, or a mask has another shape than its weight.
    """
    given = named_masks(masks)
    every = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in every if _is_matrix(module)}
    names = match_names(given, (join(name, "weight") for name in layers))
    by_weight = {own: given[name] for name, own in names.items()}
    found: dict[nn.Module, tuple[str, Tensor]] = {}  # a layer with several names counts once
    for name, module in layers.items():
        weight = join(name, "weight")
        if weight in by_weight and not (mask := by_weight[weight].bool()).all():
            check_shape(weight, mask, cast(Tensor, module.weight).shape)
            found.setdefault(module, (name, mask.flatten(1)))
    return dict(found.values())


def nothing_to_do(kind: str = "") -> MaskError:
    """Return the error for masks that prune no layer of this kind."""
    return MaskError(f"the masks prune no linear layer and no 1x1 convolution{kind}: all would stay dense")


def with_layers(
    model: nn.Module,
    masks: Masks,
    names: Collection[str],
    convert: Callable[[Any], None],
    example_input: Inputs | None,
) -> nn.Module:
    """Return a masked copy of a model, in eval mode, with the named layers converted.

    Raises
    ------
    MaskError
        If the masks do not fit the model, or the model is still wrapped.
    SpeedupError
        If a layer cannot be converted, or the copy computes something else on the example.
    """
    masked = apply_masks(copy_of(model), masks).eval()
    if example_input is not None:
        call, form = Call.to(masked, example_input), "the model with sparse layers"
        expected = outputs_of(copy_of(masked), call)
        check_same(expected, outputs_of(_converted(copy_of(masked), names, convert), call, form), form)
    return _converted(masked, names, convert)


def _converted(model: nn.Module, names: Collection[str], convert: Callable[[Any], None]) -> nn.Module:
    for name in names:
        layer: Any = model.get_submodule(name)
        kind = f"{name}, of {layer.weight.dtype} on {layer.weight.device},"
        try:
            convert(layer)
        except RuntimeError as error:
            raise SpeedupError(f"{kind} cannot be run as a sparse layer: {first_line(error)}") from error
    return model


def _is_matrix(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        unpadded = module.padding in ((0, 0), "same", "valid")
        return module.kernel_size == (1, 1) and module.groups == 1 and unpadded
    return type(module) is nn.Linear
