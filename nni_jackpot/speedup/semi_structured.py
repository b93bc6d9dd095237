"""The 2:4 pattern on CUDA: tensor cores that skip two of every four weights, from Ampere on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.errors import MaskError, SpeedupError
from nni_jackpot.masks import Masks
from nni_jackpot.speedup.matrices import Layer, masked_matrices, nothing_to_do, strides, with_layers

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
        kept = (mask != 0).unflatten(1, (-1, 4)).sum(2)
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


def semi_structured(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a model whose 2:4 layers (`check_semi_structured`) run by ``torch.sparse``'s kernels.

    Other masked layers stay dense, with zeros in them. The model itself stays as it is.

    Parameters
    ----------
    model
        The unwrapped model, on a GPU of compute capability 8.0 or more, of float16 or bfloat16.
    masks
        NNI's masks of a search with ``sparse_pattern="2:4"``.

    Returns
    -------
    nn.Module
        A copy in eval mode, to be run only. Convolutions are fastest on ``torch.channels_last`` inputs.

    Raises
    ------
    MaskError
        If the masks do not fit the model or the pattern, or the model is still wrapped.
    SpeedupError
        If the device or the type of the weights has no such kernels.
    """
    names = check_semi_structured(model, masks)
    for name in names:
        _check_kernels(name, model.get_parameter(f"{name}.weight"))
    return with_layers(model, masks, names, _SemiStructuredLayer)


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


class _SemiStructuredLayer(nn.Module):
    """A linear layer, (..., in) -> (..., out), or 1x1 convolution, (N, in, H, W) -> (N, out, H', W')."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.strides = strides(layer)
        matrix = layer.weight.detach().flatten(1).contiguous()
        self.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(matrix), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.strides is None:
            return self._of_rows(x)
        x = x[:, :, :: self.strides[0], :: self.strides[1]]
        return self._of_rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _of_rows(self, x: Tensor) -> Tensor:
        return F.linear(x.contiguous(), self.weight, self.bias)
