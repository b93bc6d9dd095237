"""Files to begin with: short runs, in which every other key stands as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.reference.keys import Key, comment, keys_of
from nni_jackpot.experiment.schema import strict_yaml

_IMAGES: dict[str, Any] = {
    "output": "runs/my-run",
    "data": {"name": "image_folder", "root": "my_images"},
    "model": {"name": "torchvision/resnet18"},
    "pretrain": {"checkpoint": "my.pth"},
    "preset": "weights",
    "sparsity": 0.9,
    "search": {"epochs": 3},
}

TEMPLATES: dict[str, dict[str, Any]] = {
    "image_folder": _IMAGES,
    "digits": {
        **_IMAGES,
        "output": "runs/digits-resnet",
        "data": {"name": "digits"},
        "model": {"name": "resnet"},
        "pretrain": {"epochs": 30, "lr": 0.1},
        "search": {"epochs": 20},
    },
    "causal_lm": {
        "output": "runs/my-language-model",
        "data": {"name": "text", "root": "my_texts", "sequences": 96},
        "model": {"name": "transformers/my_model"},
        "preset": "2:4",
        "search": {"epochs": 0, "loss": "kl", "blockwise": {"aim": "own", "skip_tokens": 1}},
    },
    "channels": {**_IMAGES, "output": "runs/my-channels", "preset": "channels", "sparsity": 0.5},
}


def commented(content: Mapping[str, Any]) -> str:
    """Return the YAML of a run, with all other keys and the meaning of all keys as comments.

    Parameters
    ----------
    content
        What the YAML file holds.
    """
    lines = ["# Keys that are comments have the value that they show."]
    kinds = get_type_hints(RunConfig)
    keys = {key.name: key for key in keys_of("", RunConfig, content)}
    for entry in fields(RunConfig):
        if not is_dataclass(kinds[entry.name]):
            if entry.name in keys:
                lines += ["", *_lines(keys[entry.name], content, "")]
        elif entry.name in content:
            lines += ["", f"{entry.name}:"]
            for key in keys_of(entry.name, kinds[entry.name], content[entry.name]):
                lines += _lines(key, content[entry.name], "  ")
    return "\n".join(lines) + "\n"


def _lines(key: Key, content: Mapping[str, Any], indent: str) -> Iterator[str]:
    yield from comment(f"{key.doc} ({key.allowed})", indent)
    if key.name in content:
        text = strict_yaml.dump({key.name: content[key.name]}).rstrip()
        yield textwrap.indent(text, indent)
    else:
        yield f"{indent}# {key.name}: {key.default}".rstrip()
