"""Long JSON texts, deflated: networks of hundreds of layers repeat their names."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Any

from nni_jackpot.storage.formats.rules import Rule
from nni_jackpot.storage.formats.sealed_format import plain

_MOST, _SHARE = 1 << 19, 16
_LONG = 1 << 15

DEFLATED = Rule(
    "`content` may be a string: JSON text deflated by zlib, in base64, that takes no more than 512 KiB and a "
    "16th of the tensors"
)


def deflated(content: Any) -> str | None:
    """Return plain data as deflated JSON text; None if the text is short.

    Raises
    ------
    TypeError, ValueError, RecursionError
        If JSON cannot represent the data.
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    if len(text) <= _LONG:
        return None
    return base64.b64encode(zlib.compress(text.encode(), level=9)).decode()


def inflated(content: str, size: int) -> Any:
    """Return the plain data of `deflated`, in a file whose tensors have ``size`` bytes.

    Raises
    ------
    TicketError
        If the text is damaged or too long, or breaks a rule for JSON text. Memory is bounded.
    """
    inflate, most = zlib.decompressobj(), _MOST + size // _SHARE
    try:
        raw = inflate.decompress(base64.b64decode(content, validate=True), most + 1)
        text = str(raw, "utf-8")
    except (zlib.error, binascii.Error, ValueError) as error:
        raise DEFLATED.broken(f"the content is damaged, {error}") from None
    if len(raw) > most or not inflate.eof or inflate.unused_data:
        raise DEFLATED.broken("the content is longer, or shorter")
    return plain(text, size)
