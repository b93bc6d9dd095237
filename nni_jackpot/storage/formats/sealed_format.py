"""The rules of sealed files; most are checked on the header, before a tensor is read.

The rules bound memory by the size of the file: parsing a header of many small values takes twenty times its
bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from nni_jackpot.storage.formats.rules import Rule, are_naturals, is_natural, is_shape

HEAD = Rule("the first 8 bytes of a file are the length of its header, little-endian, which the file holds")
HEADER_SIZE = Rule("the header takes no more than 512 KiB and a 16th of the file")
VALUES = Rule(
    "JSON text, in the header and in its metadata, has no more than 32,768 values and 1 for every 128 bytes "
    "of the file; counted are all `[`, `{` and `,`"
)
JSON = Rule(
    "JSON text is UTF-8 and at most 64 levels deep; no object has a key twice; numbers are finite and have "
    "no more than 40 characters"
)
ENTRY = Rule(
    "the header is an object with `__metadata__` and tensors by name, each of `dtype`, `shape` and "
    "`data_offsets`; a shape has at most 64 sides, whole numbers of a product of at most 2^60, a side of 0 "
    "taken for 1, and makes as many bytes as the offsets do"
)
TILING = Rule("the bytes of the tensors follow the header to the end of the file without a gap or an overlap")
METADATA = Rule(
    "`__metadata__` is an object with one entry, a string of JSON by the name of the kind of file"
)
ENVELOPE = Rule("that JSON is an object of `version`, `content` and `sha256`, and nothing else")
VERSION = Rule("`version` is a whole number, 1 or more, and no more than the reader's")
BOOLEANS = Rule("bytes of type `BOOL` are 0 or 1")
BYTES = Rule("tensors are of type `U8` and one dimension")
DIGEST = Rule("`sha256` is the digest of kind, version, content and tensors")

HEADER_RULES = (HEAD, HEADER_SIZE, VALUES, JSON, ENTRY, TILING, METADATA, ENVELOPE, VERSION)
RULES = (*HEADER_RULES, BOOLEANS, DIGEST)
PART_RULES = (*HEADER_RULES, BYTES, DIGEST)

_MOST_HEADER, _HEADER_SHARE = 1 << 19, 16
_MOST_VALUES, _BYTES_A_VALUE = 1 << 15, 128
_MOST_LEVELS = 64
_MOST_DIGITS = 40

TYPES = {  # all dtypes that the library supports
    **{"BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    TYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Entry:
    """Dtype, shape and first byte of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def header_of(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read the header: the metadata, and the entries of the tensors, whose offsets begin after the header.

    Parameters
    ----------
    file
        The file, at its first byte; afterwards at the first byte after the header.
    size
        Size of the file in bytes.

    Raises
    ------
    TicketError
        If the header breaks a rule. The rules bound the memory used.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise HEAD.broken(f"a header of {length:,} bytes in a file of {size:,}")
    if length > _MOST_HEADER + size // _HEADER_SHARE:
        raise HEADER_SIZE.broken(f"a header of {length:,} bytes in a file of {size:,}")
    try:
        text = str(file.read(length), "utf-8")
    except ValueError as error:
        raise JSON.broken(f"the header is not UTF-8, {error}") from None
    header = plain(text, size)
    if not isinstance(header, dict):
        raise ENTRY.broken("the header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ENTRY.broken("its `__metadata__` is not an object")
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, begin, stop in sorted(
        ((name, *entry["data_offsets"]) for name, entry in header.items()), key=lambda place: place[1:]
    ):
        if begin != end:
            raise TILING.broken(f"tensor {name} begins at byte {begin:,}, not {end:,}")
        end = stop
    if end != size - 8 - length:
        raise TILING.broken(f"tensors of {end:,} bytes, where the file has {size - 8 - length:,}")
    return metadata, entries


def plain(text: str, size: int) -> Any:
    """Parse a JSON text in a file of ``size`` bytes.

    Raises
    ------
    TicketError
        If the text has too many values, or is not JSON as the rules allow it.
    """
    count = sum(map(text.count, "[{,"))
    most = _MOST_VALUES + size // _BYTES_A_VALUE
    if count > most:
        raise VALUES.broken(f"{count:,} values, and a file of {size:,} bytes may have {most:,}")
    try:
        data = json.loads(
            text, object_pairs_hook=object_of, parse_int=_whole, parse_float=_real, parse_constant=_real
        )
    except (ValueError, RecursionError) as error:
        raise JSON.broken(str(error)) from None
    level = [data]
    for _ in range(_MOST_LEVELS + 1):
        level = [child for node in level for child in _children(node) if isinstance(child, list | dict)]
    if level:
        raise JSON.broken("nested lists and objects")
    return data


def envelope_of(metadata: dict[str, Any], kind: str, size: int) -> Any:
    """Parse the envelope in the metadata of a file of ``size`` bytes; its fields are not yet checked.

    Raises
    ------
    TicketError
        If the metadata do not consist of one text for this kind of file.
    """
    text = metadata.get(kind)
    if not isinstance(text, str) or len(metadata) > 1:
        raise METADATA.broken(f"`__metadata__` of {len(metadata)} entries")
    return plain(text, size)


def is_newer(envelope: Any, version: int) -> bool:
    """Return True if an envelope, valid or not, has a newer version."""
    written = envelope.get("version") if isinstance(envelope, dict) else None
    return type(written) is int and written > version


def check_envelope(envelope: Any) -> None:
    """Check the fields of an envelope, except the digest.

    Raises
    ------
    TicketError
        If a field is missing or invalid.
    """
    if not isinstance(envelope, dict) or envelope.keys() != {"version", "content", "sha256"}:
        raise ENVELOPE.broken("the metadata")
    if not is_natural(envelope["version"]) or not envelope["version"]:
        raise VERSION.broken(f"version {envelope['version']!r}")


def _entry(name: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ENTRY.broken(f"tensor {name}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    type_ = TYPES.get(dtype) if isinstance(dtype, str) else None
    if type_ is None or not (is_shape(shape) and are_naturals(offsets) and len(offsets) == 2):
        raise ENTRY.broken(f"tensor {name} of type {dtype!r}, shape {shape!r} and offsets {offsets!r}")
    if math.prod(shape) * type_.itemsize != offsets[1] - offsets[0]:
        raise ENTRY.broken(f"tensor {name} of type {dtype}, shape {shape} and offsets {offsets}")
    return Entry(type_, tuple(shape), offsets[0])


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Create the dict of key-value pairs, for a JSON parser.

    Raises
    ------
    ValueError
        If a key occurs twice.
    """
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key occurs twice")
    return data


def _whole(text: str) -> int:
    return int(_short(text))


def _real(text: str) -> float:
    number = float(_short(text))
    if not math.isfinite(number):
        raise ValueError(f"the number {text}")
    return number


def _short(text: str) -> str:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters")
    return text
