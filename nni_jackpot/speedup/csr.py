"""Unstructured zeros on a CPU: weights in compressed rows, which MKL multiplies by."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from nni_jackpot.masks import Masks
from nni_jackpot.speedup.matrices import Layer, masked_matrices, nothing_to_do, strides, with_layers


def sparse_csr(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a model whose masked linear layers and 1x1 convolutions skip their zeros.

    It pays for linear layers from some 90% of zeros on; docs/deployment.md has what it comes to. Other masked
    layers stay dense, with zeros in them. The model itself stays as it is.

    Parameters
    ----------
    model
        The unwrapped model, on the CPU, of float32 or float64.
    masks
        NNI's masks of any granularity.

    Returns
    -------
    nn.Module
        A copy in eval mode, to be run only; `nni_jackpot.speedup.export_onnx` is for the model itself.

    Raises
    ------
    MaskError
        If the masks do not fit the model, the model is still wrapped, or they prune no such layer.
    """
    names = masked_matrices(model, masks)
    if not names:
        raise nothing_to_do()
    return with_layers(model, masks, names, _CsrLayer)


class _CsrLayer(nn.Module):
    """A linear layer, (..., in) -> (..., out), or 1x1 convolution, (N, in, H, W) -> (N, out, H', W')."""

    # Apart, as plain tensors, which can be copied, moved and saved as all others.
    row_starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.strides = strides(layer)
        matrix = layer.weight.detach().flatten(1)
        self.shape = matrix.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            rows = matrix.to_sparse_csr()
        # Half the memory of indices, and what MKL takes: it would have others converted at every call.
        self.register_buffer("row_starts", rows.crow_indices().int())
        self.register_buffer("columns", rows.col_indices().int())
        self.register_buffer("values", rows.values())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.strides is None:
            return self._of_columns(x.reshape(-1, x.shape[-1]).t()).t().view(*x.shape[:-1], -1)
        x = x[:, :, :: self.strides[0], :: self.strides[1]].transpose(0, 1)
        return self._of_columns(x.flatten(1)).view(-1, *x.shape[1:]).transpose(0, 1)

    def _of_columns(self, x: Tensor) -> Tensor:
        places = self.row_starts, self.columns
        matrix = torch.sparse_csr_tensor(*places, self.values, self.shape, check_invariants=False)
        # Several times as fast as F.linear, which has rows multiplied by the transpose.
        return matrix @ x if self.bias is None else torch.addmm(self.bias, matrix, x)
