"""The 2:4 pattern on CUDA: tensor cores that skip two of every four weights, from Ampere on."""

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

# What both of PyTorch's kernels, of cuSPARSELt and of CUTLASS, take of float16 and bfloat16.
_MULTIPLES = (32, 64)


def check_semi_structured(model: nn.Module, masks: Masks) -> list[str]:
    """Return the names of the layers that the hardware runs as 2:4, on any device.

    These are the masked linear layers and 1x1 convolutions with a multiple of 32 outputs and a multiple of 64
    inputs. Search them with ``sparse_pattern="2:4"``.

    Raises
    ------
    MaskError
        If a mask keeps more than two of four neighbouring inputs in one of these layers, or there is none.
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
    """Return a model whose 2:4 layers (`check_semi_structured`) run by ``torch.sparse``'s kernels.

    Other masked layers stay dense, with zeros in them. A model that reads ``layer.weight`` instead of calling
    the layer gets the dense weight, made anew at each read, and gains nothing there. The model itself stays
    as it is.

    Parameters
    ----------
    model
        The unwrapped model, on a GPU of compute capability 8.0 or more, of float16 or bfloat16.
    masks
        NNI's masks of a search with ``sparse_pattern="2:4"``.
    example_input
        What the model takes: a tensor, a tuple or list of arguments, a dict of keyword arguments, and these
        nested. If given, outputs are compared on it.

    Returns
    -------
    nn.Module
        A copy in eval mode, to be run only. Convolutions are fastest on ``torch.channels_last`` inputs.

    Raises
    ------
    MaskError
        If the masks do not fit the model or the pattern, or the model is still wrapped.
    SpeedupError
        If the device or the type of the weights has no such kernels, or the copy computes something else on
        the example.
    """
    check_unwrapped(model)
    names = check_semi_structured(model, masks)
    for name in names:
        _check_kernels(name, model.get_parameter(join(name, "weight")))
    return with_layers(model, masks, names, _to_semi_structured, example_input)


def _check_kernels(name: str, weight: Tensor) -> None:
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise SpeedupError(
            f"{name} is on {weight.device}, and 2:4 is run by CUDA GPUs of compute capability 8.0 or more; "
            "elsewhere check_semi_structured tells whether the masks have the pattern"
        )
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise SpeedupError(
            f"{name} is of {weight.dtype}, and 2:4 is run in float16 or bfloat16: call model.half()"
        )


def _to_semi_structured(layer: Any) -> None:
    """Turn a layer into one of the kernels; its settings, bias and hooks stay."""
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
        """Return the weight for whoever reads it."""
        return self.packed.to_dense().view(self.shape)

    def of_rows(self, x: Tensor) -> Tensor:
        """Return what the layer gives, (..., out), for (..., in)."""
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
