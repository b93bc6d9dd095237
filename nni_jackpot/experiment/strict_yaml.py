"""YAML as people mean it: ``1e-3`` is a number, and a key that is given twice a mistake."""

from __future__ import annotations

import re
from typing import Any

import yaml


def parse(text: str | bytes) -> object:
    """Parse YAML; every error is a ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def dump(content: object) -> str:
    """Return the text that `parse` reads the same content from."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML without a key given twice, of which PyYAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose the mapping, and look at its keys before merge keys (``<<``) add others."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _yaml in (_Loader, _Dumper):
    # YAML 1.1 wants a dot and a signed exponent, so that PyYAML reads 1e-3 as a string.
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
