"""The form ``2:4``: float16 weights for the tensor cores of NVIDIA GPUs, from Ampere on."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_jackpot.speedup.forms.form import Form, Jackpot, Runner, register_form
from nni_jackpot.speedup.outputs import copy_of, tensors_in
from nni_jackpot.speedup.semi_structured import check_gpu, check_semi_structured, semi_structured


@register_form("2:4")
class TwoOfFour(Form):
    """The state dict in float16, packed by `nni_jackpot.speedup.semi_structured` when it is loaded."""

    suffix: ClassVar[str] = ".safetensors"
    tolerance: ClassVar[float | None] = torch.finfo(torch.float16).eps ** 0.5

    def check(self, jackpot: Jackpot) -> None:
        """Refuse masks without the pattern, and a machine without the kernels."""
        names = check_semi_structured(jackpot.model, jackpot.masks)
        check_gpu(names[0], torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def write(self, jackpot: Jackpot, path: Path) -> None:
        """Write the masked weights in float16."""
        state = copy_of(jackpot.model).half().state_dict()
        # Copies: tied weights share memory, and the format has one layout.
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)

    def load(self, path: Path, jackpot: Jackpot) -> Runner:
        """Read the weights, and pack them on the GPU."""
        model = copy_of(jackpot.model).half()
        model.load_state_dict(load_file(path))
        return _in_half(semi_structured(model.cuda(), jackpot.masks))

    def reference(self, jackpot: Jackpot) -> Runner:
        """Return the masked network in float16 on the GPU."""
        return _in_half(copy_of(jackpot.model).half().cuda())


def _in_half(model: nn.Module) -> Runner:
    def on_gpu(tensor: Tensor) -> Tensor:
        return tensor.cuda().half() if tensor.is_floating_point() else tensor.cuda()

    def run(*args: object, **kwargs: object) -> list[Tensor]:
        own_args, own_kwargs = tree_map_only(Tensor, on_gpu, (args, kwargs))
        return [tensor.cpu() for tensor in tensors_in(model(*own_args, **own_kwargs))]

    return run
