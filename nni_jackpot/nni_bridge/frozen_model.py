"""A wrapped model during a search: parameters frozen, norm statistics as asked, nothing sent in vain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from nni_jackpot.modules.batch_norm import freeze_stats
from nni_jackpot.modules.parameters import names_of_all

# Where DistributedDataParallel looks up what not to send.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
_WRAPPER = "_nni_wrapper."


class FrozenModel:
    """Freeze a model, and give it back as it was.

    Parameters
    ----------
    model
        The model, before it is wrapped.
    freezes_norm
        Whether norm statistics are frozen as well.
    tuned
        Parameters that are trained along, by name.
    """

    def __init__(
        self, model: nn.Module, freezes_norm: bool, tuned: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        parameters = names_of_all(model)
        self.tuned = tuned or {}
        self._model = model
        self._freezes_norm = freezes_norm
        self._takes_gradient = {name: p.requires_grad for name, p in parameters.items()}
        self._ids = {name: id(parameter) for name, parameter in parameters.items()}
        self._hooks: list[RemovableHandle] = []
        self._ignored_before: tuple[nn.Module, Any] | None = None

    def freeze(self) -> None:
        """Freeze the parameters, except tuned ones; again, if another compressor has re-wrapped the model."""
        # A quantizer of the same chain may have scales to train, which the model did not come with.
        for name, parameter in self._model.named_parameters():
            if (plain := name.replace(_WRAPPER, "")) in self._takes_gradient:
                parameter.requires_grad_(plain in self.tuned)
        self.freeze_statistics()

    def freeze_statistics(self) -> None:
        """Freeze norm statistics if that was asked for."""
        if self._freezes_norm and not self._hooks:
            self._hooks += freeze_stats(self._model)

    def release_statistics(self) -> None:
        """Let norm statistics adapt for now."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def names_now(self) -> dict[str, str]:
        """Return the names of parameters now by their names before wrapping, for NNI's evaluators."""
        now = {id(parameter): name for name, parameter in self._model.named_parameters()}
        return {name: now[i] for name, i in self._ids.items() if i in now}

    def spare_ddp(self, targets: Iterable[tuple[str, str]]) -> None:
        """Keep DistributedDataParallel from sending masks at every step, as it does with buffers.

        Each process computes its masks from its scores, which are the same in all processes.

        Parameters
        ----------
        targets
            Module and parameter name of each target.
        """
        is_distributed = isinstance(self._model, DistributedDataParallel)
        inner: Any = self._model.module if is_distributed else self._model
        before = getattr(inner, _DDP_IGNORES, None)
        self._ignored_before = (inner, before)
        prefix = "module." if is_distributed else ""
        masks = {f"{module.removeprefix(prefix)}.{_WRAPPER}{name}_mask" for module, name in targets}
        setattr(inner, _DDP_IGNORES, masks | set(before or ()))

    def unfreeze(self) -> None:
        """Give parameters and statistics back as they came."""
        self.release_statistics()
        for name, parameter in self._model.named_parameters():
            takes = self._takes_gradient.get(name.replace(_WRAPPER, ""), parameter.requires_grad)
            parameter.requires_grad_(takes)

    def release(self) -> None:
        """Undo all of this class."""
        if self._ignored_before is not None:
            inner, before = self._ignored_before
            delattr(inner, _DDP_IGNORES)
            if before is not None:
                setattr(inner, _DDP_IGNORES, before)
            self._ignored_before = None
        self.unfreeze()
