"""A model as an ONNX file, and that file in int8, for onnxruntime, OpenVINO and others."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.errors import MissingLibraryError, SpeedupError
from nni_jackpot.files import replace_file
from nni_jackpot.speedup.outputs import Inputs, check_same, on_cpu, outputs_of


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example_input: Inputs) -> None:
    """Write a model as an ONNX file that takes batches of any size, and see that it computes the same.

    Parameters
    ----------
    model
        A plain model: after `nni_jackpot.apply_masks`, or from `nni_jackpot.speedup.shrink`. It is exported
        in eval mode and stays as it is.
    path
        The file, ``.onnx``. Weights of more than 1.5 GiB come to lie beside it, in ``.onnx.data``.
    example_input
        What the model takes, (N, ...), or a tuple of such. onnxruntime must give on it, and on two of it at
        once, what PyTorch gives.

    Raises
    ------
    MissingLibraryError
        If onnx, onnxscript or onnxruntime is not installed.
    SpeedupError
        If the model cannot be exported, onnxruntime cannot run it, or it computes something else.
    OutputFolderError
        If the folder cannot be written. The file is whole, and checked, or not there.
    """
    _library("onnx")
    _library("onnxscript")
    runtime = _library("onnxruntime")
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise SpeedupError("the model is still wrapped by NNI: call pruner.unwrap_model() first")
    model, inputs = copy.deepcopy(model).cpu().eval(), on_cpu(example_input)
    # Not the example itself: a batch of one would become a constant.
    twice = tuple(torch.cat([x, x]) for x in inputs)
    batch = torch.export.Dim("batch")
    try:
        program = torch.onnx.export(
            model, twice, dynamo=True, dynamic_shapes=tuple({0: batch} for _ in twice), verbose=False
        )
    except Exception as error:  # the exporter raises whatever its passes meet
        reason = str(error.__cause__ or error).splitlines()[0]  # after which come pages of advice
        raise SpeedupError(f"torch.onnx cannot export the model: {reason}") from error
    assert program is not None  # as it is where no file is given

    def write(aside: Path) -> None:
        with TemporaryDirectory(dir=aside.parent) as folder:
            whole = Path(folder, Path(path).name)
            program.save(whole)
            for batches in (inputs, twice):
                found = _run(runtime, whole, batches)
                check_same(outputs_of(model, batches), found, "the ONNX file in onnxruntime")
            for data in whole.parent.glob("*.data"):
                os.replace(data, aside.with_name(data.name))
            os.replace(whole, aside)

    replace_file(path, write)


def quantize_onnx(
    path: str | os.PathLike[str], quantized: str | os.PathLike[str], batches: Iterable[Inputs]
) -> None:
    """Write an ONNX file in int8: weights by output channel, activations by the ranges of some batches.

    Weights are quantized symmetrically, so that pruned ones stay zero.

    Parameters
    ----------
    path
        A file of `export_onnx`.
    quantized
        The file to write.
    batches
        Inputs of the model, some hundred images in all.

    Raises
    ------
    MissingLibraryError
        If onnx or onnxruntime is not installed.
    SpeedupError
        If onnxruntime cannot quantize the model.
    OutputFolderError
        If the folder cannot be written; the file is whole or not there.
    """
    _library("onnx")
    runtime = _library("onnxruntime")
    quantization = _library("onnxruntime.quantization")
    shape_inference = _library("onnxruntime.quantization.shape_inference")

    def write(aside: Path) -> None:
        with TemporaryDirectory(dir=aside.parent) as folder:
            prepared = Path(folder, "prepared.onnx")
            try:
                names = [node.name for node in _session(runtime, Path(path)).get_inputs()]
                shape_inference.quant_pre_process(path, prepared)
                quantization.quantize_static(
                    prepared,
                    aside,
                    _Calibration(names, batches),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                )
            except Exception as error:
                raise SpeedupError(f"onnxruntime cannot quantize {path}: {error}") from error

    replace_file(quantized, write)


class _Calibration:
    """Batches as onnxruntime asks for them: one at a time, None after the last."""

    def __init__(self, names: list[str], batches: Iterable[Inputs]) -> None:
        self._feeds = (dict(zip(names, _arrays(on_cpu(batch)), strict=True)) for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _run(runtime: Any, path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    try:
        session = _session(runtime, path)
        names = [node.name for node in session.get_inputs()]
        arrays = session.run(None, dict(zip(names, _arrays(inputs), strict=True)))
    except Exception as error:
        raise SpeedupError(f"onnxruntime cannot run the exported model: {error}") from error
    return [torch.from_numpy(array) for array in arrays]


def _session(runtime: Any, path: Path) -> Any:
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _arrays(inputs: tuple[Tensor, ...]) -> list[Any]:
    return [x.detach().numpy() for x in inputs]


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise MissingLibraryError(
            f'{name} is not installed, which ONNX files need: pip install "nni-jackpot[deploy]"'
        ) from None
