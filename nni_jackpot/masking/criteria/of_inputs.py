"""Criteria that look at the inputs of layers: no loss, no label and no backward pass."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from nni_jackpot.masking.activations import criteria as by_rows
from nni_jackpot.masking.activations.input_statistics import Inputs
from nni_jackpot.masking.criteria.registry import Importance, finite, register_criterion


@register_criterion("wanda", needs="activations")
def wanda(weights: Mapping[Hashable, Tensor], inputs: Inputs) -> Importance:
    """Return the importance ``|w| * |x|``: magnitude times the norm of the weight's input (Wanda, Eq. 1).

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (ICLR 2024). The norm is
    over all samples: tokens, or places that a kernel is put on. It costs one run of the forwards, and a
    number for every input feature of every layer.

    Parameters
    ----------
    weights
        Weights of the layers, any shapes.
    inputs
        Statistics of the inputs of every weight's layer.

    Returns
    -------
    Importance
        Of the weights' shapes, in float32 for weights of half precision; of the weights that have inputs.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN or infinite.
    """
    return finite(
        "wanda",
        {key: seen.from_rows(by_rows.wanda(seen.rows(weights[key]), seen.squares)) for key, seen in inputs},
    )


@register_criterion("sparsegpt", needs="hessians")
def sparsegpt(weights: Mapping[Hashable, Tensor], inputs: Inputs) -> Importance:
    """Return the importance ``w^2 / [H^-1]_jj``: the error of removing a weight if its row adapts.

    Frantar and Alistarh, "SparseGPT" (ICML 2023), Eq. 3, with ``H`` the damped Gram matrix of the layer's
    inputs. Weights do not adapt in a search: the importance alone is used. It costs a run of the forwards for
    every few layers (`CollectedInputs`), Gram matrices of no more numbers than the weights or of one layer,
    and a Cholesky decomposition of order ``in`` for each layer.

    Parameters
    ----------
    weights
        Weights of the layers, any shapes.
    inputs
        Statistics of the inputs of every weight's layer, with Gram matrices.

    Returns
    -------
    Importance
        Of the weights' shapes, in float32 for weights of half precision; of the weights that have inputs.

    Raises
    ------
    SearchDivergedError
        If an importance, or an input, is NaN or infinite.
    """
    importance: Importance = {}
    for key, seen in inputs:
        assert seen.gram is not None
        importance[key] = seen.from_rows(by_rows.sparsegpt(seen.rows(weights[key]), seen.gram))
    return finite("sparsegpt", importance)
