"""Whatever stands in a file or on the command line, the way out is exit code 2 and one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nni_jackpot import cli

RUN = """
output: {0}/out
device: cpu
data: {{name: digits, batch_size: 256, train_images: 512}}
model: {{width: 2}}
pretrain: {{epochs: 0, lr: 0.1, cache: {0}/cache}}
config_list: [{{op_types: [Conv2d], sparse_ratio: 0.8}}]
search: {{epochs: 1}}
finetune: {{epochs: 0, lr: 0.05}}
"""
ENTRY = "{op_types: [Conv2d], sparse_ratio: 0.8}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yml"
    path.write_text(RUN.format(tmp_path))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command says that is refused."""
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("nni-jackpot: error: ")
    assert err.count("\n") == 1
    assert err.strip().isprintable()
    assert len(err) < 2200
    return err


# -- values


@pytest.mark.parametrize(
    "setting",
    [
        "seed=" + "[" * 100_000,
        "data.augment=!!bool x",
        "seed=!!timestamp x",
        "seed=!!int ''",
        "seed=!!binary é",
        "seed=2024-01-01",
        "seed=0001-01-01 00:00:00 +23:59",
        "seed=" + "1" * 5000,
        "seed=" + "1" * 900,
        "seed=0x" + "f" * 6000,
        "seed=1" + ":1" * 5000,
        'seed="\\UFFFFFFFF"',
        "seed=[1",
        "seed=!!python/object/apply:os.system [ls]",
        "data=!!set {a, b}",
        "data=!!omap [a: 1]",
        "data=&a {a: *a}",
        "config_list." + "1" * 5000 + ".x=1",
        "config_list.0." + ".".join("a" * 3000) + "=1",
        "config_list.00.sparse_ratio=0.5",
        "config_list.\u0660.sparse_ratio=0.5",
        "search..lr=1",
        ".=1",
        "=1",
        'output="a\\0b"',
        'output="\\ud800"',
        'pretrain.cache="a\\0b"',
        'pretrain.checkpoint="a\\0b"',
        "device=cuda:99999999999999999999",
        "device=cuda:\u0663",
        "\x1b[31mred=1",
        "seed=\x1b[31mred",
        "model.name=\x1b[31mred",
    ],
)
def test_values(setting: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "search", str(path), "--set", setting)
    assert os.listdir(tmp_path) == ["run.yml"]


@pytest.mark.parametrize("name", ["output", "pretrain.cache", "pretrain.checkpoint"])
@pytest.mark.parametrize("value", ["x" * 300, "x/" * 3000, "run.yml/below"])
def test_names_that_no_file_has(
    name: str, value: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(path.parent)
    refused(capsys, "search", str(path), "--set", f"{name}={value}")


@pytest.mark.parametrize("bad", [".nan", ".inf", "-.inf", "-1", "1e300", "1e39"])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("section", ["pretrain", "search", "finetune"])
def test_numbers_that_no_training_survives(
    section: str, name: str, bad: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{section}.{name}: found" in refused(
        capsys, "search", str(path), "--set", f"{section}.{name}={bad}"
    )


@pytest.mark.parametrize(
    "setting",
    [
        "search.temperature=1e300",
        "search.kept_score=1e300",
        "search.pruned_score=-1e300",
        "search.pruned_score=-.inf",
        "search.lr=1e10",
        "search.weight_decay=1e5",
        "search.epochs=1" + "0" * 400,
        "pretrain.epochs=10000000",
        "model.width=1000000000",
        f"model.depth={6 * 10**9 + 2}",
        "data.batch_size=" + "9" * 30,
        "data.eval_batch_size=" + "9" * 30,
        "data.image_size=1000000",
        "data.workers=100000",
        "data.train_images=" + "9" * 30,
        "search.checkpoint_every=" + "9" * 400,
    ],
)
def test_sizes_beyond_all_use(setting: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{setting.split('=')[0]}: found" in refused(capsys, "search", str(path), "--set", setting)


def test_scores_that_only_grow(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--set", "search.lr=10", "--set", "search.weight_decay=1"]
    assert "allowed: up to 0.38 with lr 10" in refused(capsys, "search", str(path), *both)
    dry = ["--set", "search.lr=10", "--set", "search.weight_decay=0.38", "--dry-run"]
    assert cli.main(["search", str(path), *dry]) == 0


@pytest.mark.parametrize("name", ["torchvision/resnet18", "vgg19"])
@pytest.mark.parametrize("size", ["width=8", "depth=14"])
def test_a_size_that_the_network_does_not_take(
    name: str, size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yml"
    path.write_text(RUN.format(tmp_path).replace("width: 2", f"name: {name}"))
    said = refused(capsys, "search", str(path), "--set", f"model.{size}")
    key, value = size.split("=")
    assert f"model.{key}: found {value}, allowed: {16 if key == 'width' else 8} for {name}" in said


# -- files


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "- " * 100_000,
        "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
        "a0: &a0 {x: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)),
        "#" * (1 << 21),
        "",
        "seed",
        "\tseed: 1",
        "seed: 1\nseed: 2",
        "seed: 1\n---\nseed: 2",
        "<<: 5",
        "=: 5",
        "[1]: 5",
        b"output: \xe9",
        b"\xff\xfea\x00\x00\xd8",
        b"a: \0",
        RUN + "2024-01-01: 1",
        RUN + "~: 1",
        RUN + ".nan: 1",
        RUN + '"\\e[31mred\\n": 1',
        RUN + '? "' + "x" * 100_000 + '"\n: 1',
        RUN.replace("width: 2", "width: !!bool x"),
        RUN.replace("width: 2", "width: " + "9" * 5000),
    ],
)
def test_files(content: str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.yml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content.format(tmp_path) if RUN in content else content)
    assert str(path) in refused(capsys, "search", str(path))


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ["", "pipe", "loop", "none", "x" * 300, "run.yml/below", "\x1b[31mred\n", "\udcff"]
    for name in names:
        refused(capsys, "search", str(tmp_path / name))
    refused(capsys, "search", os.devnull)


# -- entries of the config list


@pytest.mark.parametrize(
    "entry",
    [
        "{op_names_re: ['('], sparse_ratio: 0.5}",
        "{op_types: [Conv2d], exclude_op_names_re: ['*'], sparse_ratio: 0.5}",
        "{op_names_re: ['a{99999999999}'], sparse_ratio: 0.5}",
        "{op_names_re: [1], sparse_ratio: 0.5}",
        "{op_types: 5, sparse_ratio: 0.5}",
        "{op_types: [[Conv2d]], sparse_ratio: 0.5}",
        "{op_names: [{a: 1}], sparse_ratio: 0.5}",
        "{op_types: [Conv2d], target_names: null, sparse_ratio: 0.5}",
        "{op_types: [Conv2d], target_settings: [], sparse_ratio: 0.5}",
        "{op_types: [Conv2d], global_group_id: {a: 1}, sparse_ratio: 0.5}",
        "{op_types: [Conv2d], granularity: {a: 1}, sparse_ratio: 0.5}",
        "{op_types: [Conv2d], align: 3}",
        "{op_types: [Conv2d], sparse_pattern: '" + "1" * 5000 + ":4'}",
        "{op_partial_names: 3, sparsity: 0.5}",
        "{2024-01-01: 1}",
        "{op_types: [Conv2d], sparse_ratio: 0x" + "f" * 6000 + "}",
    ],
)
def test_entries(entry: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text().replace(ENTRY, entry))
    refused(capsys, "search", str(path))


# -- experiments and sweeps


@pytest.mark.parametrize(
    ("command", "space"),
    [
        ("'nni-jackpot search \"run.yml'", "{seed: {_type: choice, _value: [0]}}"),
        ('"nni-jackpot search \'run.yml"', "{seed: {_type: choice, _value: [0]}}"),
        ("'nni-jackpot search run.yml\\'", "{seed: {_type: choice, _value: [0]}}"),
        ('"nni-jackpot search a\\0"', "{seed: {_type: choice, _value: [0]}}"),
        ("[1]", "{seed: {_type: choice, _value: [0]}}"),
        ("nni-jackpot search run.yml", "{2024-01-01: {_type: choice, _value: [0]}}"),
        ("nni-jackpot search run.yml", "{1: {_type: choice, _value: [0]}}"),
        ("nni-jackpot search run.yml", "{~: {_type: choice, _value: [0]}}"),
        ("nni-jackpot search run.yml", "{seed: {_type: [1], _value: [0]}}"),
        ("nni-jackpot search run.yml", "{seed: {_type: choice, _value: [0, 0]}}"),
    ],
)
def test_experiments(command: str, space: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = path.with_name("experiment.yml")
    experiment.write_text(f"trialCommand: {command}\nsearchSpace: {space}\n")
    refused(capsys, "search", str(experiment))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sweep", "seed=0,0"], "two runs of the sweep are the same: seed=0"),
        (["--sweep", "seed=0,1,0.0"], "two runs of the sweep are the same"),
        (["--sweep", "search.lr=0.01,1e-2"], "two runs of the sweep are the same"),
        (["--sweep", "seed=0", "--sweep", "seed=1"], "--sweep seed is given twice, allowed: once"),
        (["--set", "seed=0", "--set", "seed=1"], "--set seed is given twice, allowed: once"),
        (["--set", "seed=0", "--sweep", "seed=1"], "seed: is both set and swept"),
        (["--set", "search.lr=0.01", "--sweep", "search=[{epochs: 1}]"], "search.lr: is both set and swept"),
        (["--sweep", "search.lr=0.01", "--sweep", "search=[{epochs: 1},{epochs: 2}]"], ""),
        (["--sweep", "seed=[]"], "found no values"),
        (["--sweep", "seed"], "KEY=VALUE"),
        (["--sweep", "seed='a"], "not valid YAML"),
        (["--sweep", "seed=[" + "0," * 20_000 + "]"], "keys and values"),
        (
            [w for i in range(6) for w in ("--sweep", f"search.{'abcdef'[i]}=[{','.join('0123456789')}]")],
            "a sweep of 1,000,000 runs",
        ),
    ],
)
def test_sweeps(
    options: list[str], words: str, path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if words:
        assert words in refused(capsys, "search", str(path), *options)
        assert os.listdir(tmp_path) == ["run.yml"]
    else:  # the latter takes the place of the former, which leaves runs that differ all the same
        assert cli.main(["search", str(path), *options, "--dry-run"]) == 0


# -- the command line itself


@pytest.mark.parametrize(
    "arguments", [[], ["foo"], ["\x1b[31mfoo\n"], ["search"], ["search", "x", "--foo"], ["apply", "x"]]
)
def test_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.strip().isprintable()


def test_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {code} " in out for code in (0, 1, 2, 130, 141, 143))
