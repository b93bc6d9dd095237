"""Comparators that prune once, from calibration data, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nni_jackpot.errors import ConfigListError
from nni_jackpot.experiment.comparators.comparator import register_comparator
from nni_jackpot.masking.activations.criteria import sparsegpt_update
from nni_jackpot.masking.activations.input_statistics import InputWatcher
from nni_jackpot.masking.activations.layers import from_rows, to_rows
from nni_jackpot.runtime.settings import option
from nni_jackpot.search.blockwise import Target, blocks_of
from nni_jackpot.search.blockwise.blocks import capture
from nni_jackpot.search.blockwise.start import layers_of
from nni_jackpot.search.blockwise.targets import by_block


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """Settings of a method that prunes a network once; it runs beside a search block by block."""

    name: ClassVar[str]
    epochs: ClassVar[int] = 0
    all_epochs: ClassVar[int] = 0
    start: ClassVar[str] = "initial"
    from_scratch: ClassVar[bool] = False

    def prune(self, model: nn.Module, batches: Sequence[Any], targets: Mapping[str, Target]) -> nn.Module:
        """Prune a network in place, and return it.

        Parameters
        ----------
        model
            A copy of the dense network.
        batches
            Calibration data.
        targets
            What to prune, by the names of parameters, with the number of grains to keep.
        """
        raise NotImplementedError


@register_comparator("sparsegpt")
@dataclass(frozen=True, kw_only=True)
class SparseGPT(OneShot):
    """SparseGPT, each block on the outputs of pruned blocks (Frantar and Alistarh, 2023)."""

    update: bool = option("whether the weights left make up for those pruned", default=True)

    @torch.no_grad()
    def prune(self, model: nn.Module, batches: Sequence[Any], targets: Mapping[str, Target]) -> nn.Module:
        """Prune by second-order saliency.

        Raises
        ------
        ConfigListError
            If a target is neither unstructured nor an N:M pattern of a matrix layer.
        """
        names = blocks_of(model)
        captured = capture(model, names, batches)
        hidden = captured.hidden
        for name, calls, own in zip(names, captured.calls, by_block(names, targets), strict=True):
            block = model.get_submodule(name)
            layers = layers_of(block, own)
            if others := own.keys() - layers:
                raise ConfigListError(
                    f"sparsegpt prunes weights of linear layers, and not {name}.{others.pop()}"
                )
            with InputWatcher(layers, gram=True) as watcher:
                for call, x, tokens in zip(calls, hidden, captured.tokens, strict=True):
                    watcher.tokens = tokens
                    call.run(block, x)
            for parameter, layer in layers.items():
                self._prune(layer, own[parameter], watcher.statistics[parameter].gram)
            hidden = [call.run(block, x) for call, x in zip(calls, hidden, strict=True)]
        return model

    def _prune(self, layer: nn.Module, target: Target, grams: Tensor | None) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert grams is not None
        found = [
            sparsegpt_update(rows, gram, **_how_sparse(target))
            for rows, gram in zip(to_rows(layer, weight), grams, strict=True)
        ]
        if self.update:
            weight.copy_(from_rows(layer, torch.stack([updated for _, updated in found])))
        else:
            weight.mul_(from_rows(layer, torch.stack([mask for mask, _ in found])))


def _how_sparse(target: Target) -> dict[str, Any]:
    """Return the density or the N:M pattern of a target."""
    grains = target.grains
    if grains.scaler is not None:
        raise ConfigListError("sparsegpt prunes single weights: give the target no granularity")
    if grains.rows == 1 or grains.row_dim is None:
        return {"density": target.keep / grains.count}
    return {"pattern": (target.keep // grains.rows, grains.count // grains.rows)}
