"""Deployment of a jackpot in a registered form: refused, or written, checked and measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.errors import SpeedupError, first_line
from nni_jackpot.masks import Masks, apply_masks, fit_masks
from nni_jackpot.runtime.files import create_folder, replace_file, target_of
from nni_jackpot.speedup.calls import Call, Inputs
from nni_jackpot.speedup.forms.form import FORMS, Form, Jackpot, Runner
from nni_jackpot.speedup.outputs import check_same, copy_of, tensors_in

_WARM_UP, _MOST_ROUNDS = 2, 1000


@dataclass(frozen=True)
class Deployment:
    """A jackpot that was written in a form; its text is one line.

    Attributes
    ----------
    form
        Name of the form.
    path
        The file or folder.
    bytes_before, bytes_after
        Size of the network's tensors, and of the file or folder.
    seconds_before, seconds_after
        Median latency of the masked network in PyTorch, which is as slow as the dense one, and of the form.
    difference
        Largest difference of an output, as a share of the largest value of the output.
    """

    form: str
    path: Path
    bytes_before: int
    bytes_after: int
    seconds_before: float
    seconds_after: float
    difference: float

    def __str__(self) -> str:
        ratio = self.seconds_after / self.seconds_before
        same = f"equal up to {self.difference:.1g} of the largest" if self.difference else "equal bit for bit"
        return (
            f"{self.path}: {self.form}, {self.bytes_before:,} -> {self.bytes_after:,} bytes, "
            f"{1000 * self.seconds_before:.3g} -> {1000 * self.seconds_after:.3g} ms (x {ratio:.2f}), "
            f"outputs {same}"
        )


def deploy(
    model: nn.Module,
    masks: Masks,
    form: str | Form,
    path: str | os.PathLike[str],
    example_input: Inputs,
    *,
    batches: Iterable[Inputs] = (),
    tokenizer: Any = None,
    seconds: float = 2.0,
) -> Deployment:
    """Write a jackpot in a form, check that the form computes the same, and measure size and latency.

    Parameters
    ----------
    model
        The unwrapped model, with the masks applied or not. It is not changed.
    masks
        NNI's masks.
    form
        Name of a registered form, ``onnx``, ``int8``, ``shrink``, ``csr``, ``2:4`` or ``hf``; or a `Form`.
    path
        The file or, for ``hf``, the folder to write.
    example_input
        Inputs of the model, (N, ...): a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        Outputs are compared, and latency is measured, on it.
    batches
        Inputs for the calibration of ``int8``, in the same form.
    tokenizer
        Tokenizer of a language model, for ``hf``.
    seconds
        Time to measure latency for. Both models run alternately, and the ratio is that of their medians.

    Returns
    -------
    Deployment
        What was written and measured.

    Raises
    ------
    ValueError
        If no form has the name.
    MaskError
        If the masks do not fit the model, the form cannot take them, or the model is still wrapped.
    SpeedupError
        If the form cannot take the model, this machine cannot run it, or it computes something else.
    MissingLibraryError
        If a library of the form is not installed.
    OutputFolderError
        If the path cannot be written. The write is atomic: after an error nothing new is left, and an
        existing file is unchanged.
    """
    way = FORMS.find(form)() if isinstance(form, str) else form
    fit_masks(model, masks)
    masked = apply_masks(copy_of(model), masks).cpu().eval().requires_grad_(False)
    call = Call.to(masked, example_input).on("cpu")
    jackpot = Jackpot(masked, masks, call, batches, tokenizer)
    way.check(jackpot)
    target, measured = Path(path), dict[str, Any]()

    def write(whole: Path) -> None:
        way.write(jackpot, whole)
        measured.update(_measured(way, jackpot, whole, seconds))

    def write_file(temporary: Path) -> None:
        with TemporaryDirectory(dir=temporary.parent) as folder:
            whole = Path(folder, target.name)
            write(whole)
            for other in whole.parent.iterdir():
                if other != whole:  # such as the large weights of an ONNX file
                    os.replace(other, temporary.with_name(other.name))
            os.replace(whole, temporary)

    if way.suffix:
        target_of(target)
        replace_file(target, write_file)
    else:
        create_folder(target, write)
    return Deployment(way.name or type(way).__name__, target, **measured)


def _measured(form: Form, jackpot: Jackpot, path: Path, seconds: float) -> dict[str, Any]:
    """Check and measure what a form has written."""
    before, after = form.reference(jackpot), form.load(path, jackpot)
    expected = _outputs(before, jackpot.example, "the masked model")
    title = f"the form {form.name}" if form.name else type(form).__name__
    difference = check_same(
        expected, _outputs(after, jackpot.example, title), title, tolerance=form.tolerance
    )
    call = jackpot.example.on("cpu")
    times = _alternated([partial(run, *call.args, **call.kwargs) for run in (before, after)], seconds)
    return {
        "bytes_before": _size_in_memory(jackpot.model),
        "bytes_after": sum(file.stat().st_size for file in _files(path)),
        "seconds_before": median(times[0]),
        "seconds_after": median(times[1]),
        "difference": difference,
    }


def _outputs(run: Runner, call: Call, title: str) -> list[Tensor]:
    own = call.on("cpu")
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            found = [tensor.cpu() for tensor in tensors_in(run(*own.args, **own.kwargs))]
    except Exception as error:  # the code of a model or of a form
        raise SpeedupError(f"{title} fails on the example input: {first_line(error)}") from error
    if not found:
        raise SpeedupError(f"{title} gives no tensor for the example input: there is nothing to compare")
    return found


def _alternated(runs: list[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Return the times of functions, in seconds, that run alternately for a time: a, b, a, b, ..."""
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    with torch.no_grad():
        for number in range(_MOST_ROUNDS):
            for run, own in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                if number >= _WARM_UP:
                    own.append(time.perf_counter() - start)
            if number > _WARM_UP and time.perf_counter() > end:
                break
    return times


def _size_in_memory(model: nn.Module) -> int:
    """Return the bytes of a model's tensors; tied ones count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _files(path: Path) -> list[Path]:
    """Return the files of a form: those of a folder, or a file with the files beside it."""
    folder = path if path.is_dir() else path.parent  # a file is alone in a temporary folder by now
    return [file for file in folder.rglob("*") if file.is_file()]
