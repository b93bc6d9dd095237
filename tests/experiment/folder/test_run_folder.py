"""A finished run stays until another is finished, and what a command refuses changes nothing."""

from __future__ import annotations

import csv
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from interruption import stopping
from tiny_runs import command, copied, files_in, outcome, write_file

from nni_jackpot import cli
from nni_jackpot.errors import OutputFolderError
from nni_jackpot.experiment import run
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.folder.result import load_result
from nni_jackpot.experiment.overlap import overlap
from nni_jackpot.experiment.run import search
from nni_jackpot.experiment.running import context
from nni_jackpot.experiment.running import image_task as images

MISTAKES = [
    ("data.name=fashion_mnist", "data.root=/nowhere"),
    ("data.train_images=99999",),
    ("data.validation_images=1436",),
    ("config_list.0.op_types=[Conv3d]",),
    ("config_list.0.op_names=[nothing]",),
    ("pretrain.checkpoint=/nope",),
    ("pretrain.checkpoint=/dev/null",),
    ("pretrain.cache=/dev/null/x",),
    ("model.name=vgg19",),  # whose pools are too many for 8 x 8 pixels
    ("model.name=torchvision/resnet18", "model.weights=IMAGENET1K_V1"),  # of three channels
    ("device=cuda:0",),
    ("search.epochs=many",),
]
OF_NO_CONSEQUENCE = "device", "pretrain.cache"  # for results, which are taken from there


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in ``out``, its ticket, and its weights in ``cache``."""
    root = tmp_path_factory.mktemp("made")
    assert command("search", write_file(root)) == 0
    assert cli.main(["export", str(root / "out")]) == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, of which nothing leads to the original."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    copied(made, tmp_path / "root")
    write_file(tmp_path / "root")
    return tmp_path / "root"


def interrupt(step: int, file: Path, *overrides: str, flags: tuple[str, ...] = ()) -> None:
    with suppress(KeyboardInterrupt), stopping(at=step):
        command("search", file, *overrides, flags=flags)


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Return the line by which a command was refused."""
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith("nni-jackpot: error: ")
    return said


# -- what is refused


@pytest.mark.parametrize(
    ("mistake", "flags"),
    [
        *((mistake, ("--overwrite",)) for mistake in MISTAKES),
        *((mistake, ()) for mistake in MISTAKES if not mistake[0].startswith(OF_NO_CONSEQUENCE)),
    ],
    ids=" ".join,
)
def test_a_refused_search_leaves_a_finished_run(
    root: Path, capsys: pytest.CaptureFixture[str], mistake: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    before = files_in(root)
    refused(capsys, command("search", root / "run.yml", *mistake, flags=flags))
    assert files_in(root) == before


@pytest.mark.parametrize("mistake", [*MISTAKES, ("seed=1",), ("search.lr=0.5",)], ids=" ".join)
def test_a_refused_pretraining_leaves_a_finished_run(
    root: Path, capsys: pytest.CaptureFixture[str], mistake: tuple[str, ...]
) -> None:
    before = files_in(root)
    refused(capsys, command("pretrain", root / "run.yml", *mistake))
    assert files_in(root) == before


@pytest.mark.parametrize("mistake", MISTAKES, ids=" ".join)
def test_a_refused_command_leaves_no_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = write_file(tmp_path)
    name = ("search", "pretrain", "overlap")[MISTAKES.index(mistake) % 3]
    refused(capsys, command(name, file, *mistake))
    assert list(tmp_path.iterdir()) == [file]


def test_a_name_that_is_too_long_leaves_no_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_file(tmp_path)
    said = refused(capsys, command("search", file, f"output={tmp_path}/new/and/{300 * 'x'}"))
    assert "File name too long" in said
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("change", ["search.epochs=3", "seed=1", "finetune.lr=0.07", "search.init=random"])
def test_a_finished_run_is_not_overwritten_unasked(
    root: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    before = files_in(root)
    said = refused(capsys, command("search", root / "run.yml", change))
    key = change.split("=")[0]
    assert f"out holds a finished run of other settings: {key} was " in said
    assert "--overwrite" in said
    refused(capsys, command("search", root / "run.yml", change, flags=("--resume",)))
    assert files_in(root) == before


def test_an_interrupted_run_of_other_settings_is_left_as_it_was(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"output={root}/own"
    interrupt(2, root / "run.yml", own)
    assert (root / "own" / "checkpoint.pth").exists()
    before = files_in(root / "own")
    for change in ("search.epochs=3", "seed=1", "data.batch_size=32", "search.lr=0.5"):
        capsys.readouterr()
        key, value = change.split("=")
        said = refused(capsys, command("search", root / "run.yml", own, change))
        assert f"{key} was " in said
        assert f" and is {value}" in said
        refused(capsys, command("pretrain", root / "run.yml", own, change))
        assert files_in(root / "own") == before
    assert command("search", root / "run.yml", own) == 0


def test_an_interrupted_tuning_of_other_settings_is_left_as_it_was(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"output={root}/own", "finetune.epochs=2"
    interrupt(2 * 2 + 2 + 1, root / "run.yml", *own)
    assert (root / "own" / "initial_tuned" / "epoch.pth").exists()
    before = files_in(root / "own")
    capsys.readouterr()
    said = refused(capsys, command("search", root / "run.yml", *own, "finetune.lr=0.07"))
    assert "initial_tuned/epoch.pth is the checkpoint of another training: lr was 0.05 and is 0.07" in said
    assert files_in(root / "own") == before


@pytest.mark.parametrize("name", ["masks.pth", "results.json", "metrics.csv", "checkpoint.pth", "config.yml"])
def test_a_place_that_is_no_file_is_known_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(context, "train_weights", None)
    (tmp_path / "out" / name).mkdir(parents=True)
    said = refused(capsys, command("search", write_file(tmp_path)))
    assert name in said
    assert [path.name for path in (tmp_path / "out" / name).parent.iterdir() if path.name != ".lock"] == [
        name
    ]


# -- the same command again


def test_the_same_command_takes_the_results_of_a_finished_run(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(run, "RunContext", None)
    before = files_in(root)
    assert command("search", root / "run.yml") == 0
    assert "jackpot" in capsys.readouterr().out
    (said,) = caplog.messages
    assert said == f"{root}/out holds this run, finished: its results are used. --overwrite repeats the run"
    assert command("search", root / "run.yml", "device=auto", "data.workers=1") == 0  # of no consequence
    assert files_in(root) == before


def test_the_same_command_is_done_again_where_results_cannot_be_believed(root: Path, made: Path) -> None:
    whole = outcome(made / "out")
    del whole["jackpot.ticket"], whole["pretrain/metrics.csv"]
    for name, content in (
        ("results.json", "{"),
        ("results.json", "[]"),
        ("masks.pth", "hello"),
        ("jackpot.pth", None),
        ("config.yml", (made / "out" / "config.yml").read_text().replace("seed: 0", "seed: 7")),
    ):
        copied(made / "out", root / "out")
        (root / "out" / name).unlink()
        if content is not None:
            (root / "out" / name).write_text(content)
        assert command("search", root / "run.yml") == 0
        found = outcome(root / "out")
        found.pop("pretrain/metrics.csv", None)  # of other weights, if the config was of another seed
        assert found == whole


# -- another run in the place of a finished one


def test_a_run_replaces_another_at_its_end(root: Path, tmp_path: Path) -> None:
    changes = "seed=1", "finetune.under=initial"
    alone = f"output={tmp_path}/alone", f"pretrain.cache={tmp_path}/cache"
    assert command("search", root / "run.yml", *changes, *alone) == 0
    (root / "out" / "notes.txt").write_text("mine")
    before = files_in(root / "out")
    interrupt(3, root / "run.yml", *changes, flags=("--overwrite",))
    assert {name: content for name, content in files_in(root / "out").items() if name in before} == before
    assert load_result(root / "out").settings["seed"] == 0
    assert cli.main(["report", str(root / "out"), "-o", str(tmp_path / "report")]) == 0
    assert command("search", root / "run.yml", *changes, flags=("--overwrite",)) == 0
    found = outcome(root / "out")
    assert found.pop("notes.txt") == b"mine"
    assert found == outcome(tmp_path / "alone")
    assert not {name for name in files_in(root / "out") if "events.out" in name} & {*before}
    assert not (root / "out" / "jackpot.ticket").exists()


def test_a_run_that_fails_replaces_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(root / "out")
    monkeypatch.setattr(
        images, "cross_entropy_step", lambda batch, model: model(batch[0]).sum() * float("nan")
    )
    assert command("search", root / "run.yml", "search.epochs=3", flags=("--overwrite",)) == 1
    assert "the loss became nan" in capsys.readouterr().err
    after = files_in(root / "out")
    assert {name: after[name] for name in before} == before
    monkeypatch.undo()
    assert command("search", root / "run.yml") == 0  # it is still there


def test_pretraining_keeps_its_metrics_when_a_search_comes_or_another(root: Path, tmp_path: Path) -> None:
    file = root / "run.yml"
    own = f"output={tmp_path}/own", f"pretrain.cache={tmp_path}/cache"
    assert command("pretrain", file, *own, "search.lr=0.5") == 0
    before = files_in(tmp_path / "own" / "pretrain")
    assert len(before) == 2
    assert command("search", file, *own) == 0
    assert command("search", file, *own, "search.epochs=1", flags=("--overwrite",)) == 0
    assert files_in(tmp_path / "own" / "pretrain") == before
    assert command("search", file, *own, "seed=1", flags=("--overwrite",)) == 0
    assert files_in(tmp_path / "own" / "pretrain") != before


def test_weights_are_trained_for_a_run_that_will_replace_another(root: Path) -> None:
    before = files_in(root / "out")
    assert command("pretrain", root / "run.yml", "seed=1", flags=("--overwrite",)) == 0
    after = files_in(root / "out")
    assert {name: after[name] for name in before} == before
    assert command("search", root / "run.yml", "seed=1", flags=("--overwrite",)) == 0
    assert load_result(root / "out").settings["seed"] == 1
    assert (root / "out" / "pretrain" / "metrics.csv").exists()
    assert not list((root / "out").glob(".replacement*"))


def test_logs_of_a_run_that_will_not_go_on_are_not_mixed_with_those_of_another(root: Path) -> None:
    own = f"output={root}/own", "search.checkpoint_every=100"
    interrupt(3, root / "run.yml", *own)
    assert not (root / "own" / "checkpoint.pth").exists()
    assert command("search", root / "run.yml", *own, "search.epochs=1") == 0
    assert len(list((root / "own" / "tensorboard").iterdir())) == 1
    with (root / "own" / "metrics.csv").open() as lines:
        assert [line["epoch"] for line in csv.DictReader(lines)] == ["1"]


def test_overlap_knows_of_a_finished_run_before_its_first_search(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(load_config(root / "run.yml", {"output": str(root / "all" / "init=grasp")}))
    monkeypatch.setattr("nni_jackpot.experiment.overlap.search", None)
    with pytest.raises(OutputFolderError, match=r"init=grasp holds a finished run"):
        overlap(load_config(root / "run.yml", {"output": str(root / "all")}))


# -- results and what they are of


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_results_have_their_settings(root: Path) -> None:
    result = load_result(root / "out")
    assert result.settings is not None
    assert result.settings["search"]["epochs"] == 2
    assert {*result.files} == {"start.pth", "masks.pth", "jackpot.pth"}
    moved = (root / "out").rename(root / "moved")
    assert load_result(moved).rows == result.rows


@pytest.mark.parametrize("reader", [["report"], ["export"], ["export", "--sparse"]], ids=" ".join)
def test_results_of_another_config_are_not_believed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: list[str]
) -> None:
    path = root / "out" / "config.yml"
    path.write_text(path.read_text().replace("sparse_ratio: 0.8", "sparse_ratio: 0.9"))
    said = refused(capsys, cli.main([*reader, str(root / "out"), "-o", str(tmp_path / "new")]))
    assert (
        "results.json is not of the config beside it: config_list.0.sparse_ratio was 0.8 and is 0.9" in said
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("reader", [["report"], ["export"]], ids=" ".join)
def test_settings_with_the_hash_of_others_are_not_believed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: list[str]
) -> None:
    settings = json.loads((root / "out" / "results.json").read_text())["settings"]
    edit(root / "out" / "results.json", settings={**settings, "seed": 5})
    assert "the hash of others" in refused(
        capsys, cli.main([*reader, str(root / "out"), "-o", str(tmp_path / "new")])
    )
    edit(root / "out" / "results.json", settings={"seed": 5}, settings_hash="ffff")
    refused(capsys, cli.main([*reader, str(root / "out"), "-o", str(tmp_path / "new")]))


@pytest.mark.parametrize("name", ["masks.pth", "jackpot.pth"])
def test_masks_of_another_run_are_not_exported(
    root: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = files_in(root / "out")
    assert command("search", root / "run.yml", "seed=1", f"output={root}/other") == 0
    (root / "out" / name).write_bytes((root / "other" / name).read_bytes())
    for flags in ([], ["--sparse"]):
        capsys.readouterr()
        said = refused(capsys, cli.main(["export", str(root / "out"), *flags]))
        assert f"{name} is not of the run in results.json" in said
    assert (root / "out" / "jackpot.ticket").read_bytes() == before["jackpot.ticket"]


def test_results_of_an_earlier_version_are_those_of_the_config(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "out" / "results.json"
    content = json.loads(path.read_text())
    for key in ("settings", "settings_hash", "files"):
        del content[key]
    path.write_text(json.dumps(content))
    assert cli.main(["report", str(root / "out"), "-o", str(tmp_path / "report")]) == 0
    assert cli.main(["export", str(root / "out")]) == 0
    assert command("search", root / "run.yml") == 0
    capsys.readouterr()
    assert "search.epochs was 2 and is 3" in refused(
        capsys, command("search", root / "run.yml", "search.epochs=3")
    )
