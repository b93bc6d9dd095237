"""Criteria that look at the training loss: at its slope, or at its curvature."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_jackpot.masking.criteria.registry import Importance, Losses, finite, register_criterion
from nni_jackpot.runtime.distributed import all_reduce_sum

# Random vectors of each batch that `obd` estimates a diagonal with.
PROBES = 16


@register_criterion("snip", needs="losses")
def snip(weights: Mapping[Hashable, Tensor], losses: Losses) -> Importance:
    """Return the importance ``|w * g|``: how fast the loss changes as the weight fades (SNIP, Eq. 13).

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
    inputs = list(weights.values())
    gradient = _Mean(inputs)
    losses(lambda loss: gradient.add(_gradient(loss, inputs)))
    products = _weighted(weights, gradient.compute())
    return finite("snip", {key: product.abs() for key, product in products.items()})


@register_criterion("taylor", needs="losses")
def taylor(weights: Mapping[Hashable, Tensor], losses: Losses) -> Importance:
    """Return the importance ``mean (w * g)^2``: the squared change of a batch's loss without the weight.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019, Sec. 3.1), to first order
    and squared before the mean over batches. `snip` takes the mean first, so that slopes of opposite sign
    cancel: at a minimum of the training loss it sees noise, and this criterion the Fisher information. For
    one batch both give one mask.

    Parameters
    ----------
    weights
        Leaf tensors that the losses are computed from, any shapes; in the same order on every rank.
    losses
        The losses of one batch or more, better of many small ones; run once.

    Returns
    -------
    Importance
        Of the weights' shapes, in float32 for weights of half precision.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN or infinite.
    """
    inputs = list(weights.values())
    squares = _Mean(inputs)

    def visit(loss: Tensor) -> None:
        slopes = _gradient(loss, inputs)
        squares.add([(_wide(x) * _wide(slope)).square() for x, slope in zip(inputs, slopes, strict=True)])

    losses(visit)
    return finite("taylor", dict(zip(weights, squares.compute(), strict=True)))


@register_criterion("grasp", needs="losses")
def grasp(weights: Mapping[Hashable, Tensor], losses: Losses) -> Importance:
    """Return the importance ``w * Hg``: pruning the smallest keeps the most gradient flow (GraSP, Eq. 16).

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
    return finite("grasp", _weighted(weights, product.compute()))


@register_criterion("obd", needs="losses")
def obd(weights: Mapping[Hashable, Tensor], losses: Losses, probes: int = PROBES) -> Importance:
    """Return the importance ``h w^2 / 2``, with ``h`` the diagonal of the loss's Hessian.

    LeCun et al., "Optimal Brain Damage" (NeurIPS 1990), Sec. 2: the rise of the loss without the weight, at a
    minimum of the loss. The diagonal is the mean of ``v * Hv`` over random vectors ``v`` of entries -1 and 1
    (Hutchinson's estimate; Bekas et al. 2007): unbiased for any loss and layer, and exact if ``H`` is
    diagonal. The alternatives know less: a Gauss-Newton matrix needs the loss as a function of the network's
    output, which a training step does not show, and the empirical Fisher information of batches is what
    `taylor` ranks by. The variance of an entry is the sum of its row's other squared entries, divided by the
    number of probes and batches. An importance may be negative.

    Parameters
    ----------
    weights
        Leaf tensors that the losses are computed from, any shapes; in the same order on every rank.
    losses
        The losses of one batch or more, which must be twice differentiable; run once.
    probes
        Number of random vectors of every batch, each of which takes a second backward pass.

    Returns
    -------
    Importance
        Of the weights' shapes, in float32 for weights of half precision.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN or infinite.
    """
    inputs = list(weights.values())
    diagonal = _Mean(inputs)
    # A separate generator: the random numbers of the training loop are unchanged.
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))

    def visit(loss: Tensor) -> None:
        slopes = _gradient(loss, inputs, create_graph=True)
        for _ in range(probes):
            vector = [_signs(x, generator) for x in inputs]
            product = _hessian_product(slopes, vector, inputs, retain_graph=True)
            diagonal.add([v * _wide(p) for v, p in zip(vector, product, strict=True)])

    with sdpa_kernel(SDPBackend.MATH):  # as for `grasp`
        losses(visit)
    means = zip(weights.items(), diagonal.compute(), strict=True)
    return finite("obd", {key: h * _wide(weight).square() / 2 for (key, weight), h in means})


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random numbers -1 and 1 of the shape of a tensor."""
    return torch.randint(2, like.shape, generator=generator).mul_(2).sub_(1).to(like)


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
    retain_graph: bool = False,
) -> Sequence[Tensor]:
    """Return the gradient of ``outputs . vector``, zero for inputs that no output depends on."""
    return torch.autograd.grad(
        outputs,
        inputs,
        vector,
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _hessian_product(
    gradient: Sequence[Tensor],
    vector: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool = False,
) -> Sequence[Tensor]:
    """Return the product of Hessian and ``vector``, from the gradient and its graph."""
    # A gradient without graph does not change with any weight.
    pairs = [(g, v.to(g)) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    outputs, vectors = zip(*pairs, strict=True)
    return _gradient(outputs, inputs, vectors, retain_graph=retain_graph)


def _weighted(weights: Mapping[Hashable, Tensor], factors: Sequence[Tensor]) -> Importance:
    return {
        key: weight.detach() * factor for (key, weight), factor in zip(weights.items(), factors, strict=True)
    }
