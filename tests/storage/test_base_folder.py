"""Tickets applied to folders of safetensors, as transformers writes them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from nni_jackpot import BaseFolder, LotteryJackpotPruner, cli, load_ticket, save_ticket
from nni_jackpot.errors import CheckpointError, MaskError, OtherBaseError, OutputFolderError
from nni_jackpot.storage import weight_folder

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 32}
TOKENS = torch.arange(24).view(2, 12)


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(tie_word_embeddings=tied, **LLAMA)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # not the frequencies of positions, which from_pretrained computes
        parameter.data = parameter.to(dtype)
    model.config.dtype = dtype
    return model


def ticket_of(model: nn.Module, path: Path, types: tuple[str, ...] = ("Linear",), **more: Any) -> Any:
    pruner = LotteryJackpotPruner(model, [{"op_types": list(types), "sparse_ratio": 0.5, **more}])
    save_ticket(path, pruner, model)
    pruner.unwrap_model()
    return load_ticket(path)


@pytest.mark.parametrize(
    ("types", "tied", "shards", "dtype"),
    [
        (("Linear",), True, "10MB", torch.float32),
        (("Linear",), True, "4KB", torch.bfloat16),
        (("Linear", "Embedding"), True, "4KB", torch.float32),
        (("Embedding",), True, "10MB", torch.float32),
        (("Linear", "Embedding"), False, "4KB", torch.bfloat16),
    ],
)
def test_the_folder_is_that_of_the_model_in_memory(
    types: tuple[str, ...], tied: bool, shards: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llama(tied, dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size=shards)
    assert len([*(tmp_path / "base").glob("*.safetensors")]) > 1 or shards == "10MB"
    ticket = ticket_of(model, tmp_path / "x.ticket", types)
    BaseFolder(tmp_path / "base").apply(ticket, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ticket.apply(model)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "base").iterdir())


def test_names_may_lack_or_have_the_prefix_of_a_head(tmp_path: Path) -> None:
    """``AutoModel`` reads the folder of a model with a head, and a model with a head that of its body."""
    model = llama(tied=True)
    of_model, of_body = ticket_of(model, tmp_path / "a"), ticket_of(model.model, tmp_path / "b")
    model.save_pretrained(tmp_path / "model")
    model.model.save_pretrained(tmp_path / "body")
    BaseFolder(tmp_path / "model").apply(of_body, tmp_path / "1")
    BaseFolder(tmp_path / "body").apply(of_model, tmp_path / "2")
    BaseFolder(tmp_path / "body").apply(of_body, tmp_path / "3")
    dense = llama().model.embed_tokens.weight
    of_body.apply(model.model)
    for folder in "13":
        body = transformers.AutoModel.from_pretrained(tmp_path / folder)
        assert all(torch.equal(body.state_dict()[k], v) for k, v in model.model.state_dict().items())
        assert torch.equal(body.embed_tokens.weight, dense)
    body = transformers.AutoModel.from_pretrained(tmp_path / "2")
    assert int((body.embed_tokens.weight == 0).sum()) == dense.numel() // 2  # by the mask of the tied head


def test_norm_statistics_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    model.train()(torch.randn(4, 3, 32, 32))  # the statistics adapt
    ticket = ticket_of(model, tmp_path / "x.ticket", ("Conv2d",))
    BaseFolder(tmp_path / "base").apply(ticket, tmp_path / "out")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    ticket.apply(model)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())


def test_every_tensor_is_hashed_once_and_one_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tied=False)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    first = ticket_of(model, tmp_path / "a")
    second = ticket_of(model, tmp_path / "b", sparse_ratio=0.75)
    alive, most, hashed = set(), [0], []
    read, digest_of = weight_folder.read_tensor, weight_folder.digest_of

    def counted_read(*arguments: Any) -> Tensor:
        tensor = read(*arguments)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(weight_folder, "read_tensor", counted_read)
    monkeypatch.setattr(weight_folder, "digest_of", lambda t: hashed.append(t.shape) or digest_of(t))
    base = BaseFolder(tmp_path / "base")
    base.apply(first, tmp_path / "first")
    base.apply(second, tmp_path / "second")
    assert most == [1]
    assert len(hashed) == len(model.state_dict())
    assert (tmp_path / "first" / "config.json").exists()
    zeros = [_zeros(tmp_path / name) for name in ("first", "second")]
    assert zeros[1] > zeros[0] > 0


def _zeros(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(int((file.get_tensor(name) == 0).sum()) for name in file.keys())  # noqa: SIM118
    return count


def test_the_command_line_in_a_fresh_process(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    ticket = ticket_of(model, tmp_path / "x.ticket", sparse_pattern="2:4", sparse_ratio=0.5)
    line = [sys.executable, "-m", "nni_jackpot.cli", "apply", "x.ticket", "base", "-o", "out"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ticket.apply(model)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def _edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def _first_to(value: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(index: dict[str, Any]) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = value

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _edit_index(f, _first_to("../outside.safetensors")), "not the name of a safetensors file"),
        (lambda f: _edit_index(f, _first_to("/etc/passwd")), "not the name of a safetensors file"),
        (lambda f: _edit_index(f, _first_to("run.py")), "not the name of a safetensors file"),
        (lambda f: _edit_index(f, _first_to(3)), "weight_map must name a file"),
        (lambda f: _edit_index(f, _first_to("absent.safetensors")), "is missing"),
        (lambda f: _edit_index(f, lambda index: index["weight_map"].popitem()), "and the index disagree"),
        (lambda f: _edit_index(f, lambda index: index["weight_map"].update(more=_any(f))), "disagree"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100000), "is damaged"),
        (lambda f: (f / "model.safetensors.index.json").write_bytes(b"\xff"), "is damaged"),
        (lambda f: (f / _any(f)).write_bytes((f / _any(f)).read_bytes()[:-1]), "is damaged"),
        (lambda f: (f / _any(f)).write_bytes(b"\xff" * 8 + (f / _any(f)).read_bytes()), "is damaged"),
        (lambda f: _link(f / _any(f)), "is a link out of its folder"),
        (lambda f: _link(f / "model.safetensors.index.json"), "is a link out of its folder"),
        (lambda f: _link(f / "config.json"), "is a link out of its folder"),
    ],
)  # fmt: skip
def test_a_bad_folder_is_refused_and_nothing_is_written(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    ticket = ticket_of(model, tmp_path / "x.ticket")
    damage(tmp_path / "base")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        BaseFolder(tmp_path / "base").apply(ticket, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def _any(folder: Path) -> str:
    return sorted(path.name for path in folder.glob("*.safetensors"))[0]


def _link(path: Path) -> None:
    outside = path.parents[1] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def test_links_into_the_blobs_of_a_cache_are_followed(tmp_path: Path) -> None:
    model = llama()
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "main", tmp_path / "cache" / "blobs"
    model.save_pretrained(snapshot)
    ticket = ticket_of(model, tmp_path / "x.ticket")
    blobs.mkdir()
    for path in snapshot.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        path.symlink_to(Path("..", "..", "blobs", f"blob-{path.name}"))
    BaseFolder(snapshot).apply(ticket, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert _zeros(tmp_path / "out") > 0 == _zeros(snapshot)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", r"pytorch_model.bin: pickles can run code.*save_pretrained"),
        ("model.Q4_1.gguf", r"dequantized weights.*gguf_file=.*ticket\.apply\(model\)"),
        ("readme.md", "save the model by save_pretrained"),
    ],
)
def test_other_formats_are_refused_with_the_remedy(name: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=remedy):
        BaseFolder(tmp_path)


def test_weights_in_other_formats_are_not_copied(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    ticket = ticket_of(model, tmp_path / "x.ticket")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("{}")
    BaseFolder(tmp_path / "base").apply(ticket, tmp_path / "out")
    left_out = {"pytorch_model.bin", "consolidated.safetensors"}
    names = {str(path.relative_to(tmp_path / "base")) for path in (tmp_path / "base").rglob("*")} - left_out
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")} == names


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = llama(tied=False)
    ticket = ticket_of(model, tmp_path / "x.ticket")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    llama(tied=True).save_pretrained(tmp_path / "tied")
    llama(tied=False).half().save_pretrained(tmp_path / "half")
    for folder, message in (
        ("other", "norm.weight"),
        ("tied", "lm_head.weight is missing"),
        ("half", "float16"),
    ):
        with pytest.raises(OtherBaseError, match=rf"{message}.*save_pretrained"):
            BaseFolder(tmp_path / folder).apply(ticket, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_outputs_that_exist_or_lie_within_the_base_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    ticket, base = ticket_of(model, tmp_path / "x.ticket"), BaseFolder(tmp_path / "base")
    for output in (tmp_path / "base", tmp_path / "base" / "out", tmp_path, tmp_path / "x.ticket"):
        with pytest.raises(OutputFolderError):
            base.apply(ticket, output)
    (tmp_path / "empty").mkdir()
    base.apply(ticket, tmp_path / "empty")
    assert _zeros(tmp_path / "empty") > 0 == _zeros(tmp_path / "base")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    ticket, base = ticket_of(model, tmp_path / "x.ticket"), BaseFolder(tmp_path / "base")

    def copyfile(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        base.apply(ticket, tmp_path / "new" / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_that_changes_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    ticket, base = ticket_of(model, tmp_path / "x.ticket"), BaseFolder(tmp_path / "base")
    base.apply(ticket, tmp_path / "out")
    llama().half().save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="has changed since"):
        base.apply(ticket, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_two_masks_of_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    shape = model.lm_head.weight.shape
    half = torch.ones(shape)
    half[0] = 0
    save_ticket(
        tmp_path / "x.ticket",
        {"lm_head": {"weight": half}, "model.embed_tokens": {"weight": half.flip(0)}},
        {name: value.clone() for name, value in model.state_dict().items()},  # not tied here
    )
    with pytest.raises(MaskError, match="are one tensor, and their masks differ"):
        BaseFolder(tmp_path / "base").apply(load_ticket(tmp_path / "x.ticket"), tmp_path / "out")


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = llama()
    ticket_of(model, tmp_path / "x.ticket")
    (tmp_path / "base").mkdir()
    line = ["apply", str(tmp_path / "x.ticket"), str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    assert cli.main(line) != 0
    assert "has no model.safetensors" in capsys.readouterr().err
