"""2:4 sparsity on CUDA: tensor cores from Ampere on skip two of every four weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.errors import MaskError, SpeedupError
from nni_jackpot.masks import Masks, check_unwrapped
from nni_jackpot.modules.parameters import join
from nni_jackpot.speedup.calls import Inputs
from nni_jackpot.speedup.matrices import masked_matrices, nothing_to_do, with_layers

# Multiples of outputs and inputs that both kernels, cuSPARSELt and CUTLASS, support in float16 and bfloat16.
_MULTIPLES = (32, 64)


def check_semi_structured(model: nn.Module, masks: Masks) -> list[str]:
    """Return the names of the layers that `semi_structured` converts; the check itself runs on any device.

    These are the masked linear layers and 1x1 convolutions whose outputs are a multiple of 32 and whose
    inputs are a multiple of 64. Search them with ``sparse_pattern="2:4"``.

    Raises
    ------
    MaskError
        If the mask of such a layer keeps more than two of four neighbouring inputs, or there is no such
        layer.
    """
    names = []
    for name, mask in masked_matrices(model, masks).items():
        if any(size % multiple for size, multiple in zip(mask.shape, _MULTIPLES, strict=True)):
            continue
        kept = mask.unflatten(1, (-1, 4)).sum(2)
        if (kept > 2).any():
            row, group = (kept > 2).nonzero()[0].tolist()
            raise MaskError(
                f"{name}.weight is not 2:4: its mask keeps {int(kept[row, group])} of the inputs {4 * group} "
                f"to {4 * group + 3} of output {row}; search with sparse_pattern='2:4'"
            )
        names.append(name)
    if not names:
        raise nothing_to_do(" with multiples of 32 outputs and of 64 inputs")
    return names


def semi_structured(model: nn.Module, masks: Masks, example_input: Inputs | None = None) -> nn.Module:
    """Return a copy of a model whose 2:4 layers (`check_semi_structured`) use ``torch.sparse``'s kernels.

    Other masked layers stay dense, with zeros in them. A model that reads ``layer.weight`` instead of calling
    the layer gains nothing there: each read builds the dense weight.

    Parameters
    ----------
    model
        The unwrapped model, in float16 or bfloat16, on a GPU of compute capability 8.0 or more. It is not
        changed.
    masks
        NNI's masks, searched with ``sparse_pattern="2:4"``.
    example_input
        Inputs of the model: a tensor, a tuple or list of arguments, or a dict of keyword arguments, which may
        be nested. If given, the outputs of both models are compared on it.

    Returns
    -------
    nn.Module
        The copy, in eval mode, for inference only. Convolutions are fastest on ``torch.channels_last``
        inputs.

    Raises
    ------
    MaskError
        If the masks do not fit the model or the pattern, or the model is still wrapped.
    SpeedupError
        If there are no 2:4 kernels for the device or dtype of the weights, or the copy computes something
        else on the example.
    """
    check_unwrapped(model)
    names = check_semi_structured(model, masks)
    for name in names:
        _check_kernels(name, model.get_parameter(join(name, "weight")))
    return with_layers(model, masks, names, _to_semi_structured, example_input)


def check_gpu(name: str, device: torch.device) -> None:
    """Check that a device has 2:4 kernels; raises SpeedupError that names the layer."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise SpeedupError(
            f"{name} is on {device}, and 2:4 needs a CUDA GPU of compute capability 8.0 or more; "
            "check_semi_structured checks the masks on any device"
        )


def _check_kernels(name: str, weight: Tensor) -> None:
    check_gpu(name, weight.device)
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise SpeedupError(f"{name} is {weight.dtype}, and 2:4 needs float16 or bfloat16: call model.half()")


def _to_semi_structured(layer: Any) -> None:
    """Convert a layer to 2:4 in place; its settings, bias and hooks stay."""
    matrix, shape = layer.weight.detach().flatten(1).contiguous(), layer.weight.shape
    del layer.weight
    layer.packed = nn.Parameter(torch.sparse.to_sparse_semi_structured(matrix), requires_grad=False)
    layer.shape = shape
    layer.__class__ = _Linear if isinstance(layer, nn.Linear) else _Conv2d


class _SemiStructured(nn.Module):
    packed: nn.Parameter
    bias: Any
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the dense weight, for code that reads ``layer.weight``."""
        return self.packed.to_dense().view(self.shape)

    def of_rows(self, x: Tensor) -> Tensor:
        """Compute the layer's outputs, (..., out), for inputs (..., in)."""
        return F.linear(x.contiguous(), self.packed, self.bias)


class _Linear(_SemiStructured, nn.Linear):
    weight = property(_SemiStructured.dense)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rows(x)


class _Conv2d(_SemiStructured, nn.Conv2d):
    weight = property(_SemiStructured.dense)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return self.of_rows(x[..., ::rows, ::columns].movedim(-3, -1)).movedim(-1, -3)
