"""Paths that come from settings: a home folder that is meant, and names of folders that are no paths."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from nni_jackpot.experiment.schema.rules import Invalid

if TYPE_CHECKING:  # which asks here for its paths
    from nni_jackpot.experiment.config import RunConfig

_LONGEST = 150  # of the 255 bytes that file systems allow, for users put something before and behind

_PLAIN = re.compile(r"(?!.*\.\.)[A-Za-z0-9_.+-]+")
_NO_STRING = re.compile(r"null|true|false|inf|nan|[^A-Za-z_].*")


def with_home(config: RunConfig) -> RunConfig:
    """Return a config whose paths have the home folder in place of ``~``.

    Raises
    ------
    Invalid
        If a path begins with ``~`` and the name of nobody.
    """
    data, pretrain = config.data, config.pretrain
    return replace(
        config,
        output=_expanded("output", config.output),
        data=replace(data, root=data.root and _expanded("data.root", data.root)),
        pretrain=replace(
            pretrain,
            cache=_expanded("pretrain.cache", pretrain.cache),
            checkpoint=pretrain.checkpoint and _expanded("pretrain.checkpoint", pretrain.checkpoint),
        ),
    )


def _expanded(key: str, path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise Invalid(key, f"found {path!r}, which is nobody's home folder; a file of that name is ./{path}")
    return expanded


def folder_name(swept: Mapping[str, object], texts: Mapping[str, str]) -> str:
    """Return the name of a folder for a run of a sweep: one name, and of no other values.

    Parameters
    ----------
    swept
        Values by dotted name.
    texts
        The values as one writes them in YAML.

    Returns
    -------
    str
        ``lr=0.1-seed=0`` where that is short and plain, else something like it with a digest of the values.
    """
    ends = [key.split(".")[-1] for key in swept]
    keys = ends if len({*ends}) == len(ends) else list(swept)
    name = "-".join(f"{key}={text}" for key, text in zip(keys, texts.values(), strict=True))
    is_plain = all(map(_PLAIN.fullmatch, [*keys, *texts.values()])) and len(name) <= _LONGEST
    if is_plain and not any(isinstance(v, str) and _NO_STRING.fullmatch(v) for v in swept.values()):
        return name
    digest = hashlib.sha256(json.dumps(swept, sort_keys=True, default=str).encode()).hexdigest()[:8]
    cleaned = re.sub(r"[^A-Za-z0-9_.=+-]+|\.\.+", "_", name)
    return f"{cleaned[: _LONGEST - 9]}-{digest}"
