"""Export to ONNX, and int8 quantization of ONNX files, for onnxruntime, OpenVINO and others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from nni_jackpot.errors import SpeedupError, first_line
from nni_jackpot.masks import check_unwrapped
from nni_jackpot.runtime.extras import library
from nni_jackpot.runtime.files import replace_file
from nni_jackpot.speedup.calls import Call, Inputs
from nni_jackpot.speedup.outputs import check_same, copy_of, outputs_of


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example_input: Inputs) -> None:
    """Export a model to an ONNX file for any batch size, and compare its outputs in onnxruntime.

    Parameters
    ----------
    model
        A model after `nni_jackpot.apply_masks`, or from `nni_jackpot.speedup.shrink`. It is exported in eval
        mode and is not changed.
    path
        The file, ``.onnx``. Weights of more than 1.5 GiB are written next to it, to ``.onnx.data``.
    example_input
        Inputs of the model: a tensor, a tuple or list of arguments, or a dict of keyword arguments, which may
        be nested. The most frequent first dimension is taken for the batch. Outputs of onnxruntime and
        PyTorch are compared on the example, and on the example with its batch doubled.

    Raises
    ------
    MissingLibraryError
        If onnx, onnxscript or onnxruntime is not installed.
    SpeedupError
        If the model is still wrapped by NNI, does not accept the example or cannot be exported, or if
        onnxruntime cannot run the file or computes something else.
    OutputFolderError
        If the folder cannot be written. The write is atomic, and happens after the comparison.
    """
    check_onnx()
    runtime = _library("onnxruntime")
    check_unwrapped(model, SpeedupError)
    model = copy_of(model).cpu().eval()
    call = Call.to(model, example_input).on("cpu")
    # Export with the doubled batch: a batch of one would become a constant.
    twice, dynamic = call.twice()
    doubled = "the model with its batch doubled"
    expected = [
        (call, outputs_of(copy_of(model), call)),
        (twice, outputs_of(copy_of(model), twice, doubled)),
    ]
    try:
        program = torch.onnx.export(
            model,
            # torch.onnx takes a final dict for keyword arguments: append an empty one.
            (*twice.args, {}) if twice.args else (),
            kwargs=twice.kwargs,
            dynamo=True,
            dynamic_shapes=dynamic.shapes_for(model),
            verbose=False,
        )
    except Exception as error:  # the exporter's passes may raise any error
        reason = first_line(error.__cause__ or error)  # pages of advice follow
        raise SpeedupError(f"torch.onnx cannot export the model: {reason}") from error
    assert program is not None  # None only if torch.onnx.export writes a file itself

    def write(temporary: Path) -> None:
        with TemporaryDirectory(dir=temporary.parent) as folder:
            whole = Path(folder, Path(path).name)
            program.save(whole)
            for inputs, outputs in expected:
                check_same(outputs, _run(runtime, whole, inputs), "the ONNX file in onnxruntime")
            for data in whole.parent.glob("*.data"):
                os.replace(data, temporary.with_name(data.name))
            os.replace(whole, temporary)

    replace_file(path, write)


def quantize_onnx(
    path: str | os.PathLike[str], quantized: str | os.PathLike[str], batches: Iterable[Inputs]
) -> None:
    """Quantize an ONNX file to int8: weights per output channel, activations by calibration on batches.

    Weights are quantized symmetrically, so pruned weights stay zero.

    Parameters
    ----------
    path
        A file of `export_onnx`.
    quantized
        The file to write.
    batches
        Inputs of the model, in the form of the example for `export_onnx`; a few hundred images are enough.

    Raises
    ------
    MissingLibraryError
        If onnx or onnxruntime is not installed.
    SpeedupError
        If onnxruntime cannot quantize the model.
    OutputFolderError
        If the folder cannot be written. The write is atomic.
    """
    _library("onnx")
    runtime = _library("onnxruntime")
    quantization = _library("onnxruntime.quantization")
    shape_inference = _library("onnxruntime.quantization.shape_inference")

    def write(temporary: Path) -> None:
        with TemporaryDirectory(dir=temporary.parent) as folder:
            prepared = Path(folder, "prepared.onnx")
            try:
                names = [node.name for node in _session(runtime, Path(path)).get_inputs()]
                shape_inference.quant_pre_process(path, prepared)
                quantization.quantize_static(
                    prepared,
                    temporary,
                    _Calibration(names, batches),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                )
            except Exception as error:
                raise SpeedupError(f"onnxruntime cannot quantize {path}: {error}") from error

    replace_file(quantized, write)


def check_onnx() -> None:
    """Check that the libraries of `export_onnx` are installed; raises MissingLibraryError."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _library(name)


def onnx_runner(path: Path) -> Callable[..., list[Tensor]]:
    """Return a function that runs a file of `export_onnx`, with as many threads as PyTorch uses."""
    runtime = _library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = _session(runtime, path, options)
    names = [node.name for node in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = session.run(None, dict(zip(names, _arrays(Call(args, kwargs)), strict=True)))
        return [torch.from_numpy(array) for array in arrays]

    return run


class _Calibration:
    """A calibration reader for onnxruntime: one batch at a time, then None."""

    def __init__(self, names: list[str], batches: Iterable[Inputs]) -> None:
        self._feeds = (_feed(names, Call.of(batch).on("cpu")) for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _run(runtime: Any, path: Path, call: Call) -> list[Tensor]:
    try:
        session = _session(runtime, path)
        names = [node.name for node in session.get_inputs()]
        arrays = session.run(None, dict(zip(names, _arrays(call), strict=True)))
    except Exception as error:
        raise SpeedupError(f"onnxruntime cannot run the exported model: {error}") from error
    return [torch.from_numpy(array) for array in arrays]


def _feed(names: list[str], call: Call) -> dict[str, Any]:
    """Return the arrays of a call by the file's input names; keyword arguments may be in any order."""
    if not call.kwargs:
        return dict(zip(names, _arrays(call), strict=True))
    leaves, _ = tree_flatten_with_path(call.kwargs)
    keys = [path for path, leaf in leaves if isinstance(leaf, Tensor)]
    paths = ["_".join(str(key).strip("[].'") for key in path) for path in keys]
    arrays = dict(zip(paths, _arrays(call), strict=True))
    # If the model takes the dict as one argument, that argument's name prefixes the names of the inputs.
    for prefix in ("", *(name.removesuffix(paths[0]) for name in names)):
        if {prefix + path for path in paths} == {*names}:
            return {prefix + path: array for path, array in arrays.items()}
    raise SpeedupError(f"the file's inputs are {names}, and the batch has {paths}")


def _session(runtime: Any, path: Path, options: Any = None) -> Any:
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _arrays(call: Call) -> list[Any]:
    return [tensor.numpy() for tensor in call.tensors()]


def _library(name: str) -> Any:
    return library(name, "deploy", "ONNX files need")
