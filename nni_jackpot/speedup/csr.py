"""Unstructured sparsity on a CPU: weights in CSR format, multiplied by MKL."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.masks import Masks
from nni_jackpot.speedup.calls import Inputs
from nni_jackpot.speedup.matrices import masked_matrices, nothing_to_do, with_layers


def sparse_csr(model: nn.Module, masks: Masks, example_input: Inputs | None = None) -> nn.Module:
    """Return a copy of a model whose masked linear layers and 1x1 convolutions skip their zeros.

    Linear layers become faster from about 90 % sparsity; docs/deployment.md has measurements. Other masked
    layers stay dense, with zeros in them. A model that reads ``layer.weight`` instead of calling the layer
    gains nothing there: each read builds the dense weight.

    Parameters
    ----------
    model
        The unwrapped model, on the CPU, in float32 or float64. It is not changed.
    masks
        NNI's masks, of any granularity.
    example_input
        Inputs of the model: a tensor, a tuple or list of arguments, or a dict of keyword arguments, which may
        be nested. If given, the outputs of both models are compared on it.

    Returns
    -------
    nn.Module
        The copy, in eval mode, for inference only. `nni_jackpot.speedup.export_onnx` takes the original
        model instead.

    Raises
    ------
    MaskError
        If the masks do not fit the model or prune no such layer, or the model is still wrapped.
    SpeedupError
        If there is no CSR product for the dtype or device of the weights, or the copy computes something else
        on the example.
    """
    names = masked_matrices(model, masks)
    if not names:
        raise nothing_to_do()
    return with_layers(model, masks, names, _to_csr, example_input)


def _to_csr(layer: Any) -> None:
    """Convert a layer to CSR in place; its settings, bias and hooks stay."""
    matrix, shape = layer.weight.detach().flatten(1), layer.weight.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        rows = matrix.to_sparse_csr()
    del layer.weight
    # int32 halves the memory of indices, and is MKL's type: other types are converted at every call.
    layer.register_buffer("row_starts", rows.crow_indices().int())
    layer.register_buffer("columns", rows.col_indices().int())
    # A parameter, since models look up device and dtype from their parameters.
    layer.values = nn.Parameter(rows.values(), requires_grad=False)
    layer.shape = shape
    layer.__class__ = _CsrLinear if isinstance(layer, nn.Linear) else _CsrConv2d
    layer.of_columns(matrix.new_zeros(matrix.shape[1], 1))  # fails for a dtype without CSR products


class _Csr(nn.Module):
    """A layer in CSR format, stored in dense tensors that can be copied, moved and saved as usual."""

    row_starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Any
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the dense weight, for code that reads ``layer.weight``."""
        return self._rows().to_dense().view(self.shape)

    def of_columns(self, x: Tensor) -> Tensor:
        """Compute the layer's outputs, (out, N), for inputs (in, N)."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._product(x)
        with torch.autocast(device, enabled=False):  # autocast's dtypes have no CSR products
            return self._product(x.to(self.values.dtype)).to(torch.get_autocast_dtype(device))

    def _product(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            product = _traced_product(self.row_starts, self.columns, self.values, x)
            return product if self.bias is None else product + self.bias.unsqueeze(1)
        # Several times faster than F.linear, which multiplies by the transpose.
        return self._rows() @ x if self.bias is None else torch.addmm(self.bias.unsqueeze(1), self._rows(), x)

    def _rows(self) -> Tensor:
        return _matrix(self.row_starts, self.columns, self.values, self.shape[1])


def _matrix(row_starts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    shape = (row_starts.shape[0] - 1, width)
    return torch.sparse_csr_tensor(row_starts, columns, values, shape, check_invariants=False)


@torch.library.custom_op("nni_jackpot::csr_product", mutates_args=())
def _traced_product(row_starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """Multiply a CSR matrix by a dense one: PyTorch cannot trace tensors in CSR format."""
    return _matrix(row_starts, columns, values, x.shape[0]) @ x


@_traced_product.register_fake
def _(row_starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(row_starts.shape[0] - 1, x.shape[1])


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
