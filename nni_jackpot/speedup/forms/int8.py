"""The form ``int8``: an ONNX file with weights and activations of 8 bits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from nni_jackpot.errors import SpeedupError
from nni_jackpot.speedup.forms.form import Jackpot, register_form
from nni_jackpot.speedup.forms.onnx import Onnx
from nni_jackpot.speedup.onnx import export_onnx, quantize_onnx


@register_form("int8")
class Int8(Onnx):
    """A quantized ONNX file, by `nni_jackpot.speedup.quantize_onnx`; takes all masks of parameters."""

    # The square root of the machine epsilon of a number of 8 bits, 2 ** -7, as for floating point.
    tolerance: ClassVar[float | None] = 2**-3.5

    def check(self, jackpot: Jackpot) -> None:
        """Refuse a machine without the libraries, and a call without batches."""
        super().check(jackpot)
        if next(iter(jackpot.batches), None) is None:
            raise SpeedupError("int8 needs batches, to measure the range of all activations")

    def write(self, jackpot: Jackpot, path: Path) -> None:
        """Export the network, and quantize the file."""
        with TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, "float.onnx")
            export_onnx(jackpot.model, whole, jackpot.example.inputs)
            quantize_onnx(whole, path, jackpot.batches)
