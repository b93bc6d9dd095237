"""Text in files, as sequences of tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nni_jackpot.errors import DatasetNotFoundError, ExperimentConfigError
from nni_jackpot.experiment.data import text
from nni_jackpot.experiment.data.loading import load_text
from nni_jackpot.experiment.data.section import TextConfig
from nni_jackpot.experiment.data.text import paragraphs, split_text

LONG = "x" * 121


class Tokenizer(SimpleNamespace):
    """One token for each character; number 0 is padding, 1 the mask."""

    all_special_ids = (0, 1)
    mask_token_id = 1

    def __call__(self, texts: str | list[str], max_length: int = 0, **options: object) -> dict:
        if isinstance(texts, str):
            return {"input_ids": [ord(c) for c in texts]}
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        for row, one in zip(ids, texts, strict=True):
            row[: len(one)] = torch.tensor([ord(c) for c in one[:max_length]])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def config(root: Path | None = None, **options: object) -> TextConfig:
    return TextConfig(name="text", root=None if root is None else str(root), **options)


def test_paragraphs_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(f"{LONG}b  \n {LONG}\n\nshort\n\n{LONG}a")
    (tmp_path / "a.md").write_text(f"{LONG}a")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "page.html").write_text(f"<p>{LONG}<b>c</b></p><i>{LONG}</i>")
    (tmp_path / "z.html").write_text(f'<div class="para">{LONG}d<p>{LONG}</p></div>')
    (tmp_path / "code.py").write_text(LONG)
    found = paragraphs(config(tmp_path))
    assert found == [f"{LONG}a", f"{LONG}b {LONG}", f"{LONG}c", f"{LONG}d{LONG}"]


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetNotFoundError, match="has no text"):
        paragraphs(config(tmp_path))
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xff" * 200)
    with pytest.raises(DatasetNotFoundError, match=r"a.txt is not text in UTF-8"):
        paragraphs(config(file))
    monkeypatch.setattr(text, "_MOST_BYTES", 100)
    with pytest.raises(DatasetNotFoundError, match="MiB of text: name a part"):
        paragraphs(config(file))


def test_the_usual_place_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "HANDBOOK_ROOT", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match="apt-get install debian-handbook"):
        paragraphs(config())


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "embeddings"])
def test_parts_do_not_overlap_and_are_the_same_at_every_seed(task: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"{chr(65 + i)}{LONG}" for i in range(40)))
    options = {"tokens": 32, "test_sequences": 5, "batch_size": 2}
    first, second = (load_text(config(file, **options), seed, Tokenizer(), task) for seed in (0, 1))
    ids = [[batch["input_ids"] for batch in data.test] for data in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*ids, strict=True))
    texts = paragraphs(config(file, **options))
    split = split_text(config(file, **options), texts, Tokenizer(), task)
    other = split_text(config(file, **options, validation=True), texts, Tokenizer(), task)
    assert not {*split.train} & {*split.test}
    assert not {*other.train} & {*other.test}
    assert not {*other.test} & {*split.test}
    assert split.train == other.train
    assert len(split.test) == len(other.test) == 5
    assert len(split.train) == len(split.sequences) - 10


def test_masked_tokens_have_labels(tmp_path: Path) -> None:
    texts = [f"{chr(65 + i)}{LONG}" for i in range(40)]
    split = split_text(config(tokens=200, test_sequences=2), texts, Tokenizer(), "masked_lm")
    batch = split.sequences.batch
    masked = batch["labels"] != -100
    assert (batch["input_ids"][masked] == 1).all()
    assert (batch["attention_mask"][masked] == 1).all()
    assert 0.1 < masked.sum() / batch["attention_mask"].sum() < 0.2


def test_more_sequences_than_exist_are_refused() -> None:
    with pytest.raises(ExperimentConfigError, match=r"data.sequences: found 31, allowed: null or 1 to 30"):
        split_text(config(sequences=31, test_sequences=5, tokens=16), [LONG] * 40, Tokenizer(), "embeddings")


def test_blank_batches_have_the_shapes_of_others() -> None:
    split = split_text(config(test_sequences=1, tokens=16), [LONG] * 4, Tokenizer(), "embeddings")
    blank, batch = split.sequences.blank(2), split.sequences.__getitems__([0, 1])
    assert {name: (v.shape, v.dtype) for name, v in blank.items()} == {
        name: (v.shape, v.dtype) for name, v in batch.items()
    }
