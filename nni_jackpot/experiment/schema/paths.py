"""Names of folders that are made from settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

_LONGEST = 150  # of the 255 bytes that file systems allow; users add prefixes and suffixes

_PLAIN = re.compile(r"(?!.*\.\.)[A-Za-z0-9_.+-]+")
_NO_STRING = re.compile(r"null|true|false|inf|nan|[^A-Za-z_].*")


def folder_name(swept: Mapping[str, object], texts: Mapping[str, str]) -> str:
    """Return the name of a folder for a run of a sweep; other values have another name.

    Parameters
    ----------
    swept
        Values by dotted name.
    texts
        The values in YAML.

    Returns
    -------
    str
        ``lr=0.1-seed=0`` where that is short and plain, else a cleaned name with a digest of the values.
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
