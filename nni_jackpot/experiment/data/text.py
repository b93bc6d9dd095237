"""Plain text: paragraphs of files, in sequences of tokens, split into training, validation and test."""

from __future__ import annotations

import html.parser
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nni_jackpot.errors import DatasetNotFoundError, ExperimentConfigError
from nni_jackpot.experiment.data.section import TextConfig
from nni_jackpot.experiment.data.spec import register_dataset

# The folder of Debian's package debian-handbook.
HANDBOOK_ROOT = "/usr/share/doc/debian-handbook/html/en-US"
# Shorter paragraphs are headings and captions.
SHORTEST = 120
_ENDINGS = (".txt", ".md", ".html")
_MOST_BYTES = 2**28


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of every ``<div class="para">``, of a page without them of every ``<p>``.

    An inner paragraph ends the outer one.
    """

    def __init__(self, has_divisions: bool) -> None:
        super().__init__()
        self.found: list[str] = []
        self._has_divisions = has_divisions
        self._open: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == ("div" if self._has_divisions else "p"):
            is_paragraph = tag == "p" or dict(attrs).get("class") == "para"
            self._open.append(is_paragraph)
            if is_paragraph:
                self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == ("div" if self._has_divisions else "p"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if any(self._open):
            self.found[-1] += data


@register_dataset("text", is_text=True)
def paragraphs(config: TextConfig) -> list[str]:
    """Return the paragraphs of a file or folder, each once, longer than `SHORTEST` characters.

    Raises
    ------
    DatasetNotFoundError
        If there is no text, a file is not UTF-8, or the files have more than 256 MiB.
    """
    root = Path(config.root or HANDBOOK_ROOT)
    found: dict[str, None] = {}
    size = 0
    for path in _files(root):
        size += path.stat().st_size
        if size > _MOST_BYTES:
            raise DatasetNotFoundError(f"{root} has more than {_MOST_BYTES >> 20} MiB of text: name a part")
        for text in _paragraphs_of(path):
            text = re.sub(r"\s+", " ", text).strip()
            if len(text) > SHORTEST:
                found[text] = None
    if not found:
        remedy = "" if config.root else ": install Debian's package (apt-get install debian-handbook), or"
        raise DatasetNotFoundError(
            f"{root} has no text{remedy} set data.root to a file or folder of {', '.join(_ENDINGS)}"
        )
    return list(found)


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    names = [Path(folder, name) for folder, _, files in os.walk(root) for name in files]
    return sorted(path for path in names if path.suffix in _ENDINGS and path.is_file())


def _paragraphs_of(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetNotFoundError(f"{path} is not text in UTF-8: {error}") from error
    if path.suffix == ".html":
        parser = _Paragraphs('<div class="para">' in text)
        parser.feed(text)
        return parser.found
    return re.split(r"\n\s*\n", text)


class Sequences(Dataset[Any]):
    """Sequences of tokens in memory, of one length.

    Parameters
    ----------
    batch
        Tensors (sequences, tokens) by the name of the network's argument.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self.shape = (next(iter(batch.values())).shape[1],)

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch of the sequences at indices."""
        at = torch.tensor(indices)
        return {name: values[at] for name, values in self.batch.items()}

    def blank(self, size: int) -> dict[str, Tensor]:
        """Return a batch of the right shapes, which takes no memory."""
        return {
            name: torch.zeros((), dtype=values.dtype).expand(size, values.shape[1])
            for name, values in self.batch.items()
        }


class Split(NamedTuple):
    """Sequences, and the indices of those to train on and to test on."""

    sequences: Sequences
    train: list[int]
    test: list[int]


def split_text(config: TextConfig, texts: Sequence[str], tokenizer: Any, task: str) -> Split:
    """Return text as sequences of tokens, split at random, in the same way at every seed of a run.

    For causal language models the paragraphs are joined and cut into sequences. For other networks each
    paragraph is a sequence, cut or padded. One of seven tokens of masked language models is masked.

    Raises
    ------
    ExperimentConfigError
        If there are too few sequences.
    """
    batch = (_joined if task == "causal_lm" else _one_by_one)(texts, tokenizer, config.tokens)
    if task == "masked_lm":
        batch |= _masked(batch, tokenizer)
    sequences = Sequences(batch)
    held_out = config.test_sequences
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()
    test, validation, rest = order[:held_out], order[held_out : 2 * held_out], order[2 * held_out :]
    wanted = len(rest) if config.sequences is None else config.sequences
    if wanted > len(rest) or not rest:
        most = len(sequences) - 2 * held_out
        raise ExperimentConfigError(
            f"data.sequences: found {config.sequences}, allowed: null or 1 to {most} of the "
            f"{len(sequences)} sequences of {config.tokens} tokens, of which 2 x data.test_sequences are set "
            "aside"
        )
    return Split(sequences, rest[:wanted], validation if config.validation else test)


def _joined(texts: Sequence[str], tokenizer: Any, tokens: int) -> dict[str, Tensor]:
    ids = torch.tensor(tokenizer("\n".join(texts), verbose=False)["input_ids"])
    return {"input_ids": ids[: len(ids) // tokens * tokens].view(-1, tokens)}


def _one_by_one(texts: Sequence[str], tokenizer: Any, tokens: int) -> dict[str, Tensor]:
    options = {"padding": "max_length", "truncation": True, "max_length": tokens, "return_tensors": "pt"}
    return dict(tokenizer(list(texts), **options))


def _masked(batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """Return inputs with masked tokens, and labels: -100 for tokens that are not masked."""
    ids = batch["input_ids"]
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15
    for special in tokenizer.all_special_ids:
        chosen &= ids != special
    return {
        "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~chosen, -100),
    }
