"""Runs of networks of transformers on text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_language import save_network, save_text, write_run
from tiny_runs import command
from tiny_runs import write_file as tiny_run

from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.folder.result import load_result
from nni_jackpot.experiment.running.context import RunContext
from nni_jackpot.masks import apply_masks, load_masks

pytest.importorskip("transformers")

KINDS = {
    "LlamaForCausalLM": ("kl", ["perplexity"]),
    "BertForMaskedLM": ("kl", ["perplexity"]),
    "BertModel": ("cosine", ["cosine", "neighbour"]),
    "BertForSequenceClassification": ("mse", ["agreement"]),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path / "text.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block(
    kind: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss, measures = KINDS[kind]
    told: list[tuple[float, dict[str, float]]] = []
    monkeypatch.setattr(
        "nni_jackpot.experiment.run.report_final", lambda value, **others: told.append((value, others))
    )
    network = save_network(tmp_path / "network", kind)
    search = {"loss": loss, "polish": {"steps": 2}}
    file = write_run(tmp_path, network, search=search)
    assert command("search", file) == 0
    said = capsys.readouterr().out
    result = load_result(tmp_path / "out")
    assert [row.kind for row in result.rows] == ["dense", "initial", "sparsegpt", "jackpot"]
    assert all(list(row.values) == measures for row in result.rows)
    assert told == [(result.rows[-1].main, {"sparsity": 0.5, "overlap": result.overlap})]
    assert all(row.tokens is not None for row in result.rows[1:])
    assert "wanda mask alone" in said
    if measures == ["perplexity"]:
        assert "perplexity (lower is better)" in said
    else:
        assert result.rows[0].main == pytest.approx(1)
    masks = load_masks(tmp_path / "out" / "masks.pth")
    found = [mask for own in masks.values() for mask in own.values() if mask is not None]
    assert all(torch.equal(mask.reshape(-1, 4).sum(1), torch.full((mask.numel() // 4,), 2)) for mask in found)
    context = RunContext(load_config(file))
    if "agreement" not in measures and "cosine" not in measures:  # others need the dense network first
        assert context.evaluate(apply_masks(context.model, masks)) == pytest.approx(result.rows[-1].main)
    assert command("report", tmp_path / "out", flags=("-o", str(tmp_path / "report"))) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "accuracy by method" not in page.lower()
    assert command("search", file, flags=("--dry-run",)) == 0


def test_zeros_shared_out_by_a_criterion_of_losses(text: Path, tmp_path: Path) -> None:
    network = save_network(tmp_path / "network", "BertModel")
    config_list = [{"op_types": ["Linear"], "exclude_op_names": ["pooler.dense"], "sparse_ratio": 0.5}]
    search = {"loss": "cosine", "init": "obd", "budget": "global_rank", "init_batches": 2}
    found = []
    for output in ("one", "two"):
        changes = {"search": search, "config_list": config_list, "output": str(tmp_path / output)}
        assert command("search", write_run(tmp_path, network, **changes)) == 0
        masks = load_masks(tmp_path / output / "masks.pth")
        found.append([mask for own in masks.values() for mask in own.values() if mask is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    weights = sum(mask.numel() for mask in found[0])
    assert sum(int(mask.sum()) for mask in found[0]) == weights - weights // 2
    assert len({mask.mean().item() for mask in found[0]}) > 1
    rows = load_result(tmp_path / "one").rows[1:]
    assert {row.sparsity for row in rows} == {0.5}


def test_the_network_as_a_whole(text: Path, tmp_path: Path) -> None:
    network = save_network(tmp_path / "network")
    search = {"epochs": 2, "blockwise": None, "norm": "freeze"}
    for loss in ("kl", "labels"):
        changes = {"search": {**search, "loss": loss}, "output": str(tmp_path / loss), "comparators": {}}
        assert command("search", write_run(tmp_path, network, **changes)) == 0
        rows = load_result(tmp_path / loss).rows
        assert [row.kind for row in rows] == ["dense", "initial", "jackpot"]
        assert "perplexity" in (tmp_path / loss / "metrics.csv").read_text()


@pytest.mark.parametrize("init", ["snip", "grasp", "taylor", "obd", "wanda", "sparsegpt"])
def test_masks_of_criteria_without_labels(init: str, text: Path, tmp_path: Path) -> None:
    network = save_network(tmp_path / "network", "BertModel")
    search = {"epochs": 0, "blockwise": None, "loss": "cosine", "init": init, "init_batches": 2}
    config_list = [{"op_types": ["Linear"], "exclude_op_names": ["pooler.dense"], "sparse_ratio": 0.5}]
    changes = {"search": search, "config_list": config_list, "comparators": {}}
    assert command("search", write_run(tmp_path, network, **changes)) == 0
    rows = load_result(tmp_path / "out").rows
    assert [row.kind for row in rows] == ["dense", "initial", "jackpot"]
    assert rows[1].sparsity == 0.5
    assert rows[1].main < rows[0].main
    kept = [mask for own in load_masks(tmp_path / "out" / "start.pth").values() for mask in own.values()]
    for mask in kept:  # not the first weights, as of equal importances
        assert mask is None or mask.all() or 0 < mask.flatten()[: mask.numel() // 2].mean() < 1


def test_an_interrupted_search_continues_after_its_last_block(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nni_jackpot.experiment.running import blockwise

    network = save_network(tmp_path / "network")
    file = write_run(tmp_path, network)
    assert command("search", file) == 0
    whole = load_masks(tmp_path / "out" / "masks.pth")
    write = blockwise.write_state

    def interrupted(*arguments: object) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(blockwise, "write_state", interrupted)
    other = f"output={tmp_path / 'other'}"
    assert command("search", file, other) != 0
    monkeypatch.setattr(blockwise, "write_state", write)
    assert command("search", file, other) == 0
    result = load_result(tmp_path / "other")
    assert result.resumed_step == 1
    masks = load_masks(tmp_path / "other" / "masks.pth")
    assert all(
        torch.equal(masks[m][n], whole[m][n]) for m in whole for n in whole[m] if whole[m][n] is not None
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("search.epochs=1", "search.epochs: found 1, allowed: 0 beside blockwise"),
        ("search.norm=tune", "search.norm: found tune, allowed beside blockwise: adapt, freeze"),
        ("search.polish={steps: 1}", "search.loss: found labels, allowed beside polish: kl, cosine, mse"),
        ("data={name: digits}", "model.name"),
        ("pretrain.epochs=1", "pretrain: found a training"),
        (
            "finetune={epochs: 1, lr: 0.1}",
            "finetune.epochs: found initial_tuned, which is only allowed without",
        ),
        ("search.blockwise=null", "comparators.sparsegpt: found sparsegpt, which is only allowed beside"),
        ("search.blockwise.start=wonder", "search.blockwise.start: found 'wonder'"),
        ("data.train_images=5", "data.train_images: unknown key"),
        ("data.sequences=10000", "data.sequences: found 10000, allowed: null or 1 to"),
        ("model.name=transformers/package:no_such_package", "no Python package no_such_package"),
    ],
)
def test_wrong_settings(
    change: str, said: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = save_network(tmp_path / "network")
    assert command("search", write_run(tmp_path, network, search={"loss": "labels"}), change) != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_embeddings_have_no_labels(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = save_network(tmp_path / "network", "BertModel")
    changes = {"search": {"epochs": 1, "blockwise": None, "loss": "labels"}, "comparators": {}}
    assert command("search", write_run(tmp_path, network, **changes)) != 0
    assert "search.loss: found labels, allowed for this network: kl, cosine, mse" in capsys.readouterr().err


def test_images_are_searched_without_labels(tmp_path: Path) -> None:
    file = tiny_run(tmp_path, search={"loss": "kl"}, finetune={"epochs": 0, "under": "initial"})
    assert command("search", file) == 0
    assert [row.kind for row in load_result(tmp_path / "out").rows][-1] == "jackpot"


def test_results_tell_what_rows_took(text: Path, tmp_path: Path) -> None:
    network = save_network(tmp_path / "network")
    assert command("search", write_run(tmp_path, network)) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[0]["tokens"] is None
    assert rows[1]["tokens"] == 24 * 16
    assert rows[1]["accuracy"] is None
