"""The form ``onnx``: an ONNX file, for onnxruntime, OpenVINO and others."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from nni_jackpot.speedup.forms.form import Form, Jackpot, Runner, register_form
from nni_jackpot.speedup.onnx import check_onnx, export_onnx, onnx_runner


@register_form("onnx")
class Onnx(Form):
    """An ONNX file in float32, by `nni_jackpot.speedup.export_onnx`; takes all masks of parameters."""

    suffix: ClassVar[str] = ".onnx"

    def check(self, jackpot: Jackpot) -> None:
        """Refuse a machine without the libraries."""
        check_onnx()

    def write(self, jackpot: Jackpot, path: Path) -> None:
        """Export the network."""
        export_onnx(jackpot.model, path, jackpot.example.inputs)

    def load(self, path: Path, jackpot: Jackpot) -> Runner:
        """Open the file in onnxruntime."""
        return onnx_runner(path)
