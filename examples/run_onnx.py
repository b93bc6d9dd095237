"""Classify images by a deployed ONNX file. Only numpy, Pillow and onnxruntime are needed.

``nni-jackpot deploy RUN --form onnx`` writes the file, and beside it ``onnx.inputs.json``, which says how
images become its inputs:

    python run_onnx.py RUN/deployed/onnx.onnx IMAGE ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def prepared(path: str, image_size: int, how: dict) -> np.ndarray:
    """Return an image, resized, cropped and normalised, as float32 (3, image_size, image_size)."""
    image = Image.open(path).convert("RGB")
    shorter, resize = min(image.size), how["resize"]
    if how["crop"] == "squash":
        size = (resize, resize)
    else:  # the shorter side becomes `resize`
        size = tuple(int(resize * side / shorter) for side in image.size)
    image = image.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = (round((side - image_size) / 2) for side in image.size)
    image = image.crop((left, top, left + image_size, top + image_size))
    pixels = np.asarray(image, dtype=np.float32) / 255
    normalised = (pixels - np.float32(how["mean"])) / np.float32(how["std"])
    return normalised.transpose(2, 0, 1)


def main(model: str, *images: str) -> None:
    """Print the class of each image."""
    seen = json.loads(Path(model).with_suffix(".inputs.json").read_text())
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    batch = np.stack([prepared(path, seen["image_size"], seen["preprocess"]) for path in images])
    (logits,) = session.run(None, {session.get_inputs()[0].name: batch})
    for path, label in zip(images, logits.argmax(1), strict=True):
        print(f"{path}: {seen['classes'][label]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
