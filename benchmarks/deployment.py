"""Compare deployed jackpots: form, requirements, file size, latency, accuracy.

Each form is timed alternately with the dense model in the same engine and with the dense model in PyTorch.
The small ResNet is trained and searched here, on scikit-learn's digits; the large networks have random
weights and random masks.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import openvino
import torch
from common import arguments, bars, interleave, ratio, report
from masked import KINDS, SPARSE, Masked, digits, random
from models import Case
from torch import Tensor, nn

from nni_jackpot.errors import MaskError
from nni_jackpot.speedup import export_onnx, quantize_onnx, shrink, sparse_csr

CASES = ["resnet50@224:1", "vit_b_16@224:1"]
ENGINES = ("PyTorch", "PyTorch CSR", "onnxruntime", "OpenVINO", "onnxruntime int8", "OpenVINO int8")

Run = Callable[[Tensor], Any]


@dataclass
class Form:
    """A masked model in an engine."""

    engine: str
    run: Run
    file: Path


def in_torch(model: nn.Module, file: Path, engine: str = "PyTorch") -> Form:
    """Return a form that runs in PyTorch."""
    torch.save(model.state_dict(), file)
    return Form(engine, torch.no_grad()(model.forward), file)


def in_onnxruntime(file: Path, engine: str) -> Form:
    """Return a form that runs in onnxruntime, with PyTorch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Form(engine, lambda x: session.run(None, {name: x.numpy()})[0], file)


def in_openvino(file: Path, engine: str) -> Form:
    """Return a form that runs in OpenVINO, in float32; its default is bfloat16 on CPUs that support it."""
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5,  # the least share of zeros at which it is to be tried
    }
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    return Form(engine, lambda x: request.infer([x.numpy()])[0], file)


def forms(masked: Masked, folder: Path) -> Iterator[Form]:
    """Yield every form of a masked model, one at a time."""
    stem = folder / masked.kind.replace(":", "").replace(" ", "-")
    model = masked.model
    if masked.kind == "channels 50%":
        logging.disable(logging.ERROR)  # NNI's ModelSpeedup tells every step
        model = shrink(model, masked.masks, masked.images[:1])
        logging.disable(logging.NOTSET)
    yield in_torch(model, stem.with_suffix(".pth"))
    if masked.kind in SPARSE:
        with contextlib.suppress(MaskError):  # no linear layer and no 1x1 convolution
            yield in_torch(sparse_csr(model, masked.masks), stem.with_suffix(".csr.pth"), "PyTorch CSR")
    file, int8 = stem.with_suffix(".onnx"), stem.with_suffix(".int8.onnx")
    export_onnx(model, file, masked.images[:1])
    yield in_onnxruntime(file, "onnxruntime")
    yield in_openvino(file, "OpenVINO")
    if masked.kind != "2:4":
        quantize_onnx(file, int8, [masked.images if masked.labelled is None else masked.labelled[0]])
        yield in_onnxruntime(int8, "onnxruntime int8")
        yield in_openvino(int8, "OpenVINO int8")


def sizes(file: Path) -> tuple[float, float]:
    """Return the size of a file in MiB, and its zipped size."""
    archive = file.with_name("archive.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(file)
    return file.stat().st_size / 2**20, archive.stat().st_size / 2**20


def accuracy(run: Run, masked: Masked) -> str:
    """Return the share of test images that are classified correctly, if there are test images."""
    if masked.labelled is None:
        return "-"
    images, labels = masked.labelled
    return f"{(torch.as_tensor(run(images)).argmax(1) == labels).float().mean():.2%}"


def table(name: str, models: Iterable[Masked], seconds: float) -> Iterator[tuple[list[str], float]]:
    """Yield the rows of a network, each with its ratio to the dense model in the same engine."""
    dense: dict[str, Run] = {}
    with TemporaryDirectory() as folder:
        for masked in models:
            for form in forms(masked, Path(folder)):
                peer = form.engine.replace(" CSR", "").replace(" int8", "")
                if masked.kind == "dense":
                    dense[form.engine] = form.run
                runs = {"form": form.run, "peer": dense[peer], "PyTorch": dense["PyTorch"]}
                calls = {which: partial(run, masked.images) for which, run in runs.items()}
                for call in calls.values():
                    call()
                times = interleave(calls, seconds, masked.images.device)
                row = [name, masked.kind, form.engine, *(f"{size:.2f}" for size in sizes(form.file))]
                row += [f"{1000 * median(times['form']):.3g} ms"]
                row += [ratio(times["form"], times[other]) for other in ("peer", "PyTorch")]
                yield [*row, accuracy(form.run, masked)], median(times["form"]) / median(times["peer"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Case.parse, nargs="*", default=[Case.parse(case) for case in CASES])
    parser.add_argument("--seconds", type=float, default=10, help="time per row; at least four rounds")
    args = arguments(parser, "deployment")
    if args.device.type != "cpu":
        parser.error("these engines run on a CPU")
    kinds, epochs = list(KINDS), 10
    if args.smoke:
        args.cases, args.seconds, kinds, epochs = [], 0.0, ["95%"], 1
    networks = {"digits ResNet": digits(64, epochs, kinds)}
    for case in args.cases:  # 2:4 is run by no engine here, and random masks have no accuracy
        networks[str(case)] = random(case, [kind for kind in kinds if kind != "2:4"])
    rows, ratios = [], {}
    for name, models in networks.items():
        for row, over_dense in table(name, models, args.seconds):
            print(*row, file=sys.stderr, flush=True)
            rows.append(row)
            ratios[name, row[1], row[2]] = over_dense
    drawn = [("channels 50%", "onnxruntime"), *((kind, "PyTorch CSR") for kind in SPARSE)]
    drawn += [("95%", "onnxruntime"), ("95%", "onnxruntime int8"), ("channels 50%", "onnxruntime int8")]

    def draw(axes: Any) -> None:
        series = {", ".join(key): [ratios.get((n, *key), 0.0) for n in networks] for key in drawn}
        bars(axes, list(networks), series)
        axes.set_ylabel("latency ÷ dense model, same engine")

    header = ["network@pixels:batch", "form", "needs", "MiB", "zipped", "latency"]
    report(args, [*header, "÷ dense, same engine", "÷ dense, PyTorch", "accuracy"], rows, draw)


if __name__ == "__main__":
    main()
