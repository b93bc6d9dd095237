"""Which dimensions of a weight are inputs and outputs, and which parameters of a module are weights.

Most layers have one ``weight`` of shape (out, in, ...). Transposed convolutions and ``Conv1D`` of
transformers have (in, out). ``nn.MultiheadAttention`` has an ``in_proj_weight``. Fused experts of
transformers have the matrices of all experts in one parameter, (experts, out, in) or (experts, in, out).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Layout(NamedTuple):
    """The dimensions of a weight."""

    output_dim: int = 0
    input_dim: int = 1
    experts_dim: int | None = None
    """The dimension of the experts, each of which has its own matrix."""

    def blocks(self, granularity: str, dims: int) -> list[int]:
        """Return NNI's block sizes of ``out_channel`` or ``in_channel`` for ``dims`` dimensions."""
        single = {self.output_dim if granularity == "out_channel" else self.input_dim, self.experts_dim}
        return [1 if dim in single else -1 for dim in range(dims)]


def is_transposed(module: nn.Module) -> bool:
    """Return True if the weight of a layer has its inputs first."""
    return is_conv1d(module) or isinstance(
        module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    )


def is_conv1d(module: nn.Module) -> bool:
    """Return True for ``Conv1D`` of transformers: a linear layer with a weight of shape (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def layout_of(module: nn.Module, name: str) -> Layout:
    """Return the layout of a parameter of a module."""
    if name in experts_of(module):
        return Layout(2, 1, 0) if _experts_are_transposed(module) else Layout(1, 2, 0)
    return Layout(1, 0) if is_transposed(module) else Layout()


def matrices_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a module that has no ``weight``; empty for all other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight",)
    return experts_of(module)


def experts_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of fused experts, each of shape (experts, ..., ...).

    Empty for other modules, and where nothing says which dimension is the input.
    """
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int) or "weight" in module._parameters:
        return ()
    names = tuple(n for n, p in module._parameters.items() if p is not None and p.dim() == 3)
    fit = all(module._parameters[name].shape[0] == experts for name in names)  # type: ignore[union-attr]
    return names if fit and _experts_are_transposed(module) is not None else ()


def _experts_are_transposed(module: nn.Module) -> bool | None:
    """Return whether experts have their inputs first; None if that is not known.

    Transformers says so in most classes. In the others, gates and ups in one matrix are twice as many as the
    inputs of the matrix that follows.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    first, second = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if first is None or second is None or first.dim() != 3 or second.dim() != 3:
        return None
    if first.shape[1] == 2 * second.shape[2] and first.shape[2] == second.shape[1]:
        return False
    return True if first.shape[2] == 2 * second.shape[1] and first.shape[1] == second.shape[2] else None


def searched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers of a model by name, but the last linear layer."""
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in kinds and name not in linear[-1:]
    }
