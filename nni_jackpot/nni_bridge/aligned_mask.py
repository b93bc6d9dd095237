"""Masks that follow the mask of another target (NNI's ``align``)."""

from __future__ import annotations

import torch
from nni.compression.base.target_space import PruningTargetSpace
from torch import Tensor

from nni_jackpot.masking.masked_weights import without_gradients
from nni_jackpot.nni_bridge.wrapper import ALIGNED, raw_mask, refresh_mask


class AlignedMask:
    """The mask of a target that follows the mask of another target (NNI's ``align``).

    Parameters
    ----------
    source
        Target space of the mask that is followed.
    dims
        Dimensions of the source's mask that the target has. The target's mask is zero where the source's mask
        is zero over all other dimensions.
    """

    def __init__(self, source: PruningTargetSpace, dims: tuple[int, ...]) -> None:
        self.source = source
        self.dims = dims
        self._seen: tuple[int, int] | None = None

    def _kept(self) -> Tensor:
        """Return where the source keeps a weight: boolean, one dimension for each of ``dims``."""
        mask = raw_mask(self.source).bool()
        dims = {dim % mask.dim() for dim in self.dims}
        others = [dim for dim in range(mask.dim()) if dim not in dims]
        return mask.any(dim=others) if others else mask

    @without_gradients
    def refresh(self, space: PruningTargetSpace) -> None:
        """Update the mask of ``space``; for an input or output, after a forward has shown its shape."""
        refresh_mask(self.source)
        mask = raw_mask(self.source)
        seen = (id(mask), mask._version)
        if space.shape is None or (seen == self._seen and space.mask is not None):
            return
        kept = self._kept()
        if space._scaler is not None:
            whole = space._scaler.expand(kept, space.shape)
            grains = space._scaler.shrink(whole, lambda values: values.any(-1), keepdim=True)
            kept = space._scaler.expand(grains, space.shape, keepdim=True, full_expand=False)
        before, kept = space.mask, kept.to(self.source.target.dtype)
        if before is not None:
            kept = kept.expand_as(before)
        if before is None or not torch.equal(before, kept):
            # Not in place: the autograd graph of a forward may need the former mask.
            space._set_wrapper_attr(space._mask_name, kept.clone())
        self._seen = seen


def align(space: PruningTargetSpace, source: PruningTargetSpace, dims: tuple[int, ...]) -> None:
    """Make the mask of ``space`` follow that of ``source``; it is updated before every use."""
    setattr(space._wrapper, ALIGNED.format(space._target_name), AlignedMask(source, dims))
    refresh_mask(space)
