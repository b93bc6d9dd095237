"""The rules of the ticket format, in the order of the checks, and the parser of a ticket's content.

The parser needs no model and decodes nothing; the rules in `DECODING_RULES` are checked on decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from nni_jackpot.modules.parameters import join
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage import norm_statistics
from nni_jackpot.storage.formats import coded_mask, mask_codec, sealed_format
from nni_jackpot.storage.formats.byte_planes import FORM, PACKED, Form
from nni_jackpot.storage.formats.coded_mask import CodedMask
from nni_jackpot.storage.formats.deflated import DEFLATED, inflated
from nni_jackpot.storage.formats.rules import Rule, error_prefix
from nni_jackpot.storage.tuned_values import TUNED, TUNED_VALUES, tuned_forms

CodedMasks: TypeAlias = Mapping[str, Mapping[str, CodedMask | None]]

DIGEST_SIZE = 32
# Prefixes of the targets for inputs and outputs: NNI's INPUT_PREFIX and OUTPUT_PREFIX.
ACTIVATIONS = ("_input_", "_output_")
_WEIGHTS, _WEIGHTS_A_BYTE = 1 << 26, 1 << 17

CONTENT = Rule(
    "`content` is an object of `masks`, `base`, `statistics` and `metadata`, of `tuned` where there are any, "
    "and nothing else; `metadata` is an object of anything"
)
MASKS = Rule("`masks` is an object by module, of objects by target, of masks or null")
NAMES = Rule("no two masks are of one NAME: MODULE.TARGET, or TARGET where MODULE is empty")
TENSORS = Rule(
    "the tensors are `base`, `statistics`, `tuned` if the content has one, and `mask.NAME` for each mask "
    "with a stream; there are no others"
)
BASE = Rule("`base` is a list of names, none of them twice, and the tensor `base` has 32 bytes for each")
MASKED = Rule(
    "a mask is of a name in `base` or `tuned`, except one of a TARGET that begins with "
    f"{' or '.join(ACTIVATIONS)}"
)
STATISTICS = Rule("`statistics` is an object of `[type, shape]` by names that are not in `base`")
CLAIM = Rule(
    "masks that are decoded without a model (`Ticket.masks`) have no more than 2^26 weights, and 2^17 for "
    "every byte of the tensors"
)

CONTENT_RULES = (
    *sealed_format.PART_RULES,
    DEFLATED,
    CONTENT,
    MASKS,
    NAMES,
    *coded_mask.RULES,
    TENSORS,
    BASE,
    MASKED,
    STATISTICS,
    FORM,
    norm_statistics.STATISTIC,
    TUNED,
)
DECODING_RULES = (CLAIM, mask_codec.DECODED, PACKED, norm_statistics.VALUES, TUNED_VALUES)
RULES = CONTENT_RULES + DECODING_RULES


def parse(
    content: Any, parts: Mapping[str, bytes]
) -> tuple[CodedMasks, dict[str, bytes], dict[str, Any], dict[str, Form], dict[str, Form]]:
    """Check a ticket; return masks, base hashes, metadata, and forms of statistics and tuned parameters.

    Parameters
    ----------
    content
        The JSON content of the sealed file, deflated where it is long.
    parts
        The bytes of the file's tensors, by name.

    Raises
    ------
    TicketError
        If the ticket breaks a rule.
    """
    if isinstance(content, str):
        content = inflated(content, sum(map(len, parts.values())))
    keys = {"masks", "base", "statistics", "metadata"}
    if not isinstance(content, dict) or content.keys() - {"tuned"} != keys:
        raise CONTENT.broken("the content")
    if not isinstance(content["metadata"], dict):
        raise CONTENT.broken("the metadata")
    coded = _masks(content["masks"], parts)
    streams = {f"mask.{name}" for name, _, mask in named(coded) if mask.stream}
    others = parts.keys() ^ {*({"base", "statistics", "tuned"} & {"base", "statistics", *content}), *streams}
    if others:
        raise TENSORS.broken(f"tensor {min(others)}")
    names = content["base"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BASE.broken("the names of the base")
    if len(set(names)) != len(names) or len(parts["base"]) != DIGEST_SIZE * len(names):
        raise BASE.broken(
            f"{len(names)} names, {len(set(names))} different ones, and {len(parts['base'])} bytes"
        )
    base = {name: parts["base"][i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE] for i, name in enumerate(names)}
    tuned = content.get("tuned")
    known = base.keys() | (tuned.keys() if isinstance(tuned, dict) else set())
    for name, target, _ in named(coded):
        if is_parameter(target) and name not in known:
            raise MASKED.broken(f"the mask of {name}")
    statistics = _statistics(content["statistics"], base)
    forms = tuned_forms(tuned, {*base, *statistics}) if "tuned" in content else {}
    return coded, base, content["metadata"], statistics, forms


def check_claim(coded: CodedMasks, size: int) -> None:
    """Bound the memory for decoding all masks of a ticket with ``size`` bytes of tensors, without a model.

    Raises
    ------
    TicketError
        If the masks claim to be larger.
    """
    weights = sum(mask.size for *_, mask in named(coded))
    if weights > _WEIGHTS + _WEIGHTS_A_BYTE * size:
        raise CLAIM.broken(f"masks of {weights:,} weights in {size:,} bytes")


def named(coded: CodedMasks) -> Iterator[tuple[str, str, CodedMask]]:
    """Iterate over ``(name in the state dict, NNI's target, mask)``, without the masks that are None."""
    for module, targets in coded.items():
        for target, mask in targets.items():
            if mask is not None:
                yield join(module, target), target, mask


def is_parameter(target: str) -> bool:
    """Return True if NNI's target is a parameter, not an input or output."""
    return not target.startswith(ACTIVATIONS)


def _masks(masks: Any, parts: Mapping[str, bytes]) -> CodedMasks:
    if not isinstance(masks, dict) or not all(isinstance(targets, dict) for targets in masks.values()):
        raise MASKS.broken("the masks")
    names: set[str] = set()
    for module, targets in masks.items():
        for target in targets:
            name = join(module, target)
            if name in names:
                raise NAMES.broken(f"two masks of {name}")
            names.add(name)
    return {
        module: {
            target: _mask(join(module, target), described, parts) for target, described in targets.items()
        }
        for module, targets in masks.items()
    }


def _mask(name: str, described: Any, parts: Mapping[str, bytes]) -> CodedMask | None:
    if described is None:
        return None
    with error_prefix(f"the mask of {escaped(name)}"):
        return CodedMask.described(described, parts.get(f"mask.{name}", b""))


def _statistics(statistics: Any, base: Mapping[str, bytes]) -> dict[str, Form]:
    if not isinstance(statistics, dict):
        raise STATISTICS.broken("the statistics")
    forms = {}
    for name, described in statistics.items():
        if not isinstance(described, list) or len(described) != 2 or not isinstance(described[1], list):
            raise STATISTICS.broken(f"the statistic {name}")
        if name in base:
            raise STATISTICS.broken(f"the statistic {name}, which is in the base")
        forms[name] = Form(described[0], tuple(described[1]))
        norm_statistics.check_form(name, forms[name])
    return forms
