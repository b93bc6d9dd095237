"""The pruning criteria that a search can start from (Appendix A): targets in, importance out.

A criterion maps the weights of all targets at once to importances of the same shapes; larger means more
important. All targets at once, because some criteria need the whole network's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.runtime.distributed import all_reduce_sum
from nni_jackpot.runtime.registry import Registry

Importance: TypeAlias = dict[Hashable, Tensor]
Losses: TypeAlias = Callable[[Callable[[Tensor], None]], None]
"""Runs training steps and hands every loss, with its graph, to the visitor (`calibration.losses_of`)."""
Criterion: TypeAlias = Callable[[Mapping[Hashable, Tensor], Losses | None], Importance]

C = TypeVar("C", bound=Criterion)


def magnitude(weights: Mapping[Hashable, Tensor], losses: Losses | None = None) -> Importance:
    """Importance ``|w|`` (Eq. 11)."""
    return {key: weight.detach().abs() for key, weight in weights.items()}


def random(weights: Mapping[Hashable, Tensor], losses: Losses | None = None) -> Importance:
    """Importance uniform in [0, 1) (Sec. 3.3, Random).

    Drawn from PyTorch's global CPU generator whatever the device, so that ``torch.manual_seed`` decides the
    mask and the same seed gives the same one on every device.
    """
    return {key: torch.rand(weight.shape).to(weight.device) for key, weight in weights.items()}


def snip(weights: Mapping[Hashable, Tensor], losses: Losses | None) -> Importance:
    """Importance ``|w * g|``: how fast the loss changes as the weight fades (SNIP, Eq. 13).

    ``g`` is the gradient of the loss, averaged over all batches and, under `torch.distributed`, over all
    ranks. A weight that no loss depends on has importance 0.

    Parameters
    ----------
    weights
        Leaf tensors that the losses are computed from, any shapes; in the same order on every rank.
    losses
        The losses of one batch or more; run once.

    Returns
    -------
    Importance
        Of the weights' shapes, in float32 for weights of half precision.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN or infinite.
    """
    assert losses is not None, "snip needs losses"
    inputs = list(weights.values())
    gradient = _Mean(inputs)
    losses(lambda loss: gradient.add(_gradient(loss, inputs)))
    products = _weighted(weights, gradient.compute())
    return _finite("snip", {key: product.abs() for key, product in products.items()})


def grasp(weights: Mapping[Hashable, Tensor], losses: Losses | None) -> Importance:
    """Importance ``w * Hg``: pruning the smallest keeps the most gradient flow (GraSP, Eq. 16).

    ``g`` and ``H`` are gradient and Hessian of the loss over all ``weights`` together, averaged over all
    batches and, under `torch.distributed`, over all ranks. A weight that no loss depends on has importance 0.

    Parameters
    ----------
    weights
        Leaf tensors that the losses are computed from, any shapes; in the same order on every rank.
    losses
        The losses of one batch or more, which must be twice differentiable. Run once for a single batch;
        twice for more, first for ``g`` and then for ``Hg``, so the second run should give the same batches.

    Returns
    -------
    Importance
        Of the weights' shapes, signed, in float32 for weights of half precision.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN or infinite.
    """
    assert losses is not None, "grasp needs losses"
    inputs = list(weights.values())
    gradient, product = _Mean(inputs), _Mean(inputs)

    def visit(loss: Tensor) -> None:
        # The first batch may turn out to be the only one: its own gradient is g then.
        is_first = gradient.batches == 0
        slopes = _gradient(loss, inputs, create_graph=is_first)
        gradient.add(slopes)
        if is_first:
            product.add(_hessian_product(slopes, [slope.detach() for slope in slopes], inputs))

    def visit_again(loss: Tensor) -> None:
        product.add(_hessian_product(_gradient(loss, inputs, create_graph=True), g, inputs))

    with sdpa_kernel(SDPBackend.MATH):  # the only kind of PyTorch's attention that is twice differentiable
        losses(visit)
        g = gradient.compute()
        if gradient.batches > 1:
            product = _Mean(inputs)
            losses(visit_again)
    return _finite("grasp", _weighted(weights, product.compute()))


CRITERIA: Registry[Criterion] = Registry("criterion")
NEEDS_LOSSES: set[str] = set()
"""The criteria that look at losses, and not at weights alone."""


def register_criterion(name: str, needs: Literal["weights", "losses"] = "weights") -> Callable[[C], C]:
    """Return a decorator that registers a criterion under a name, with the evidence that it needs."""

    def decorate(criterion: C) -> C:
        registered = CRITERIA.register(name)(criterion)
        (NEEDS_LOSSES.add if needs == "losses" else NEEDS_LOSSES.discard)(name)
        return registered

    return decorate


register_criterion("magnitude")(magnitude)
register_criterion("random")(random)
register_criterion("snip", needs="losses")(snip)
register_criterion("grasp", needs="losses")(grasp)


class _Mean:
    """Mean over batches of tensors of the shapes of ``like``, summed in float32 at least."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.batches = 0
        self._sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in like]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add what one batch gives."""
        self.batches += 1
        for total, tensor in zip(self._sums, tensors, strict=True):
            total += tensor.detach().to(total)

    def compute(self) -> list[Tensor]:
        """Return the mean over the batches of all ranks, and count these in ``batches`` from then on."""
        count = torch.tensor(self.batches, device=self._sums[0].device)
        all_reduce_sum((count, *self._sums))
        self.batches = int(count)
        return [total / self.batches for total in self._sums]


def _gradient(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    vector: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    """Return the gradient of ``outputs . vector``, zero for inputs that no output depends on."""
    return torch.autograd.grad(
        outputs, inputs, vector, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _hessian_product(
    gradient: Sequence[Tensor], vector: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the product of Hessian and ``vector``, from the gradient and its graph."""
    # A gradient without graph does not change with any weight.
    pairs = [(g, v.to(g)) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    outputs, vectors = zip(*pairs, strict=True)
    return _gradient(outputs, inputs, vectors)


def _weighted(weights: Mapping[Hashable, Tensor], factors: Sequence[Tensor]) -> Importance:
    return {
        key: weight.detach() * factor for (key, weight), factor in zip(weights.items(), factors, strict=True)
    }


def _finite(criterion: str, importance: Importance) -> Importance:
    for key, values in importance.items():
        if not values.isfinite().all():
            raise SearchDivergedError(
                f"the {criterion} importance of {key} is not finite: the loss, or a gradient of it, became "
                "NaN or infinite on the batches it was computed from"
            )
    return importance
