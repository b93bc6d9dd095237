"""Strict YAML: ``1e-3`` is a number, a duplicate key is an error, and size and depth are bounded.

A few hundred bytes of aliases can expand to gigabytes, brackets can be nested deeper than Python's stack, and
a device has no end. Content beyond the bounds is refused, in bounded time and memory.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from nni_jackpot.errors import ExperimentConfigError

_MOST_BYTES = 1 << 20
_MOST_NODES = 20_000  # keys and values, with aliases expanded
_DEEPEST = 50
_LONGEST_NUMBER = 1000  # characters


def read(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a YAML file.

    Raises
    ------
    OSError
        If it cannot be read, or is not a regular file.
    ValueError
        If it is too large.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder raises its own error
        raise OSError(errno.EINVAL, "it is a pipe or a device, allowed: a file")
    with Path(path).open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return content


def parse(text: str | bytes, *, like_nni: bool = False) -> object:
    """Parse YAML; every error is a ValueError of one line.

    Parameters
    ----------
    text
        The YAML.
    like_nni
        Whether ``1e-3`` is a string, as in PyYAML, with which NNI reads its experiments.
    """
    try:
        return yaml.load(text, Loader=_Bounded if like_nni else _Loader)
    except yaml.MarkedYAMLError as error:
        said = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{' '.join(said.split())}{place}") from error
    except Exception as error:  # an error of PyYAML about a value that does not fit its tag
        said = " ".join(str(error).split())
        if not isinstance(error, ValueError | yaml.YAMLError):
            said = f"a value is not of the kind that its tag says ({type(error).__name__}: {said})"
        raise ValueError(said) from error


def parse_file(path: str | os.PathLike[str]) -> object:
    """Read and parse the YAML file of a run.

    Raises
    ------
    ExperimentConfigError
        If the file cannot be read, or is not valid YAML.
    """
    try:
        return parse(read(path))
    except OSError as error:
        raise ExperimentConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExperimentConfigError(f"{path}: is not valid YAML: {error}") from error


def dump(content: object) -> str:
    """Return YAML text from which `parse` reads equal content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Bounded(yaml.SafeLoader):
    """A loader with bounds that refuses duplicate keys, of which PyYAML would use the last."""

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self._depth = 0
        self._composed = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, and count its content with aliases expanded."""
        self._depth += 1
        self._composed += 1
        start = self.peek_event().start_mark
        _refuse(self._depth > _DEEPEST, f"more than {_DEEPEST} levels within each other", start)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if node not in self._sizes:
            self._sizes[node] = 1 + sum(self._sizes.get(child, 1) for child in _children(node))
        too_many = max(self._composed, self._sizes[node]) > _MOST_NODES
        _refuse(too_many, f"more than {_MOST_NODES:,} keys and values, those of aliases included", start)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, and check its keys before merge keys (``<<``) add others."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                _refuse((key.tag, key.value) in seen, f"the key {key.value!r} appears twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_number(self, node: Any) -> int | float | str:
        """Construct a number after a check of its length; ``2:4`` is a string."""
        too_long = len(self.construct_scalar(node)) > _LONGEST_NUMBER
        _refuse(too_long, f"a number of more than {_LONGEST_NUMBER:,} characters", node.start_mark)
        if ":" in node.value:  # YAML 1.1 counts 2:4 in units of 60
            return self.construct_scalar(node)
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


class _Loader(_Bounded):
    """Reads ``1e-3`` as a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _refuse(is_wrong: bool, problem: str, mark: Any) -> None:
    if is_wrong:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


for _kind in ("int", "float"):
    _Bounded.add_constructor(f"tag:yaml.org,2002:{_kind}", _Bounded.construct_number)
for _yaml in (_Loader, _Dumper):
    # YAML 1.1 wants a dot and a signed exponent, so that PyYAML reads 1e-3 as a string.
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
