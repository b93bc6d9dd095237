"""Unstructured zeros on a CPU: weights in compressed rows, which MKL multiplies by."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.masks import Masks
from nni_jackpot.speedup.calls import Inputs
from nni_jackpot.speedup.matrices import masked_matrices, nothing_to_do, with_layers


def sparse_csr(model: nn.Module, masks: Masks, example_input: Inputs | None = None) -> nn.Module:
    """Return a model whose masked linear layers and 1x1 convolutions skip their zeros.

    It pays for linear layers from some 90% of zeros on; docs/deployment.md has what it comes to. Other masked
    layers stay dense, with zeros in them. A model that reads ``layer.weight`` instead of calling the layer
    gets the dense weight, made anew at each read, and gains nothing there. The model itself stays as it is.

    Parameters
    ----------
    model
        The unwrapped model, on the CPU, of float32 or float64.
    masks
        NNI's masks of any granularity.
    example_input
        What the model takes: a tensor, a tuple or list of arguments, a dict of keyword arguments, and these
        nested. If given, outputs are compared on it.

    Returns
    -------
    nn.Module
        A copy in eval mode, to be run only; `nni_jackpot.speedup.export_onnx` is for the model itself.

    Raises
    ------
    MaskError
        If the masks do not fit the model, the model is still wrapped, or they prune no such layer.
    SpeedupError
        If the weights are of a type or on a device without such products, or the copy computes something
        else on the example.
    """
    names = masked_matrices(model, masks)
    if not names:
        raise nothing_to_do()
    return with_layers(model, masks, names, _to_csr, example_input)


def _to_csr(layer: Any) -> None:
    """Turn a layer into one of compressed rows; its settings, bias and hooks stay."""
    matrix, shape = layer.weight.detach().flatten(1), layer.weight.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        rows = matrix.to_sparse_csr()
    del layer.weight
    # Half the memory of indices, and what MKL takes: it would have others converted at every call.
    layer.register_buffer("row_starts", rows.crow_indices().int())
    layer.register_buffer("columns", rows.col_indices().int())
    # A parameter, since models ask their parameters for device and type.
    layer.values = nn.Parameter(rows.values(), requires_grad=False)
    layer.shape = shape
    layer.__class__ = _CsrLinear if isinstance(layer, nn.Linear) else _CsrConv2d
    layer.of_columns(matrix.new_zeros(matrix.shape[1], 1))  # fails for types that have no such product


class _Csr(nn.Module):
    """Compressed rows, kept as plain tensors, which can be copied, moved and saved as all others."""

    row_starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Any
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the weight for whoever reads it."""
        return self._rows().to_dense().view(self.shape)

    def of_columns(self, x: Tensor) -> Tensor:
        """Return what the layer gives, (out, N), for (in, N)."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._product(x)
        with torch.autocast(device, enabled=False):  # to types of which there are no such products
            return self._product(x.to(self.values.dtype)).to(torch.get_autocast_dtype(device))

    def _product(self, x: Tensor) -> Tensor:
        # Several times as fast as F.linear, which has rows multiplied by the transpose.
        return self._rows() @ x if self.bias is None else torch.addmm(self.bias.unsqueeze(1), self._rows(), x)

    def _rows(self) -> Tensor:
        places, shape = (self.row_starts, self.columns), (self.shape[0], self.shape[1])
        return torch.sparse_csr_tensor(*places, self.values, shape, check_invariants=False)


class _CsrLinear(_Csr, nn.Linear):
    weight = property(_Csr.dense)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_columns(x.reshape(-1, x.shape[-1]).t()).t().view(*x.shape[:-1], self.out_features)


class _CsrConv2d(_Csr, nn.Conv2d):
    weight = property(_Csr.dense)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        x = x[..., ::rows, ::columns].movedim(-3, 0)
        return self.of_columns(x.flatten(1)).view(self.out_channels, *x.shape[1:]).movedim(0, -3)
