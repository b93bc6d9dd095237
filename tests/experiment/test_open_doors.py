"""One module outside the package for each kind of algorithm: it works by its name, with no file touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ConvNet, make_evaluator
from tiny_runs import command, write_file

from nni_jackpot import LotteryJackpotPruner, cli
from nni_jackpot.experiment.comparators import COMPARATORS
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.sweep import runs_of
from nni_jackpot.masking.budgets import BUDGETS
from nni_jackpot.masking.criteria import CRITERIA
from nni_jackpot.masking.methods.method import METHODS

MODULES = {
    "my_criterion": '''
from nni_jackpot.masking.criteria import register_criterion

@register_criterion("signed")
def signed(weights, losses=None):
    """Importance ``w``: large positive weights are kept."""
    return {key: weight.detach().clone() for key, weight in weights.items()}
''',
    "my_activations": '''
from nni_jackpot.masking.criteria import register_criterion

@register_criterion("largest_inputs", needs="activations")
def largest_inputs(weights, inputs):
    """Importance ``|x|``: weights of the largest inputs are kept, whatever the weights are."""
    return {
        key: seen.from_rows(0 * seen.rows(weights[key]) + seen.squares[:, None]) for key, seen in inputs
    }
''',
    "my_needy_budget": '''
from nni_jackpot.masking.budgets import as_configured, register_budget

@register_budget("wanda_sees", needs="wanda")
def wanda_sees(units, importance):
    """Give each target its own ratio, once Wanda has seen activations."""
    assert all(values.max() > 0 for values in importance.values())
    return as_configured(units, importance)
''',
    "my_budget": '''
from nni_jackpot.masking.budgets import kept_count, register_budget

@register_budget("first_dense")
def first_dense(units, importance):
    """Take all zeros from targets other than the first, in proportion to their size."""
    first, *others = units
    zeros = sum(unit.grains - kept_count(unit.grains, unit.sparse_ratio) for unit in units.values())
    total = sum(units[key].grains for key in others)
    return {key: unit.grains - (0 if key is first else zeros * unit.grains // total) for key, unit in units.items()}
''',
    "my_method": '''
from dataclasses import dataclass
from nni_jackpot.masking.methods.method import MaskSchedule, Method, register_method
from nni_jackpot.runtime.settings import between, option

@register_method("late_ramp")
@dataclass(frozen=True, kw_only=True)
class LateRamp(Method):
    """Zeros ramp up to the given progress, without soft masks."""

    until: float = option("progress at which the masks have all their zeros", between(0, 1), 0.75)
    rounds: int = option("a whole number", between(1, 9), 1)

    @property
    def schedule(self):
        return MaskSchedule(ramp_end=self.until)
''',
    "my_data": '''
import torch
from nni_jackpot.experiment.data.datasets import in_memory
from nni_jackpot.experiment.data.spec import register_dataset

@register_dataset("stripes", classes=2, shape=(1, 8, 8), train_images=160)
def stripes(config):
    """Noise with a bright row or a bright column."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(200) % 2
    images[labels == 0, :, 3] = 255
    images[labels == 1, :, :, 3] = 255
    return in_memory(config, (images[:160], labels[:160]), (images[160:], labels[160:]), 2, max_shift=1)
''',
    "my_comparator": '''
from dataclasses import dataclass
import torch
from nni_jackpot.experiment.comparators import Comparator, register_comparator
from nni_jackpot.runtime.settings import between, option

@register_comparator("tiny_set")
@dataclass(frozen=True, kw_only=True)
class TinySet(Comparator):
    """Prune the smallest weights and regrow as many at random (SET, Mocanu et al. 2018)."""

    share: float = option("share of kept weights replaced", between(0, 1), 0.3)
    every: int = option("steps between updates", between(1, 1000), 2)

    def update(self, masks, weights, gradients, step):
        if step.number % self.every or step.number == step.total:
            return
        for name, mask in masks.items():
            count = int(self.share * int(mask.sum()))
            least = weights[name].abs().masked_fill(~mask, torch.inf).view(-1).topk(count, largest=False)
            free = torch.rand(mask.shape).masked_fill(mask.cpu(), -1).view(-1).topk(count)
            mask.view(-1)[least.indices] = False
            mask.view(-1)[free.indices] = True
        step.memory["updates"] = step.memory.get("updates", 0) + 1
''',
}
# What the YAML file says of each, and what the dry run and the report must show of it.
USES: dict[str, tuple[list[str], str, str]] = {
    "my_criterion": (["search.init=signed"], "", "signed mask alone"),
    "my_activations": (
        [
            "search.init=largest_inputs",
            "search.init_batches=2",
            "config_list.0={op_types: [Conv2d], sparse_ratio: 0.5}",
        ],
        "",
        "largest_inputs mask alone",
    ),
    "my_needy_budget": (["search.budget=wanda_sees"], "", ""),
    "my_budget": (
        ["search.budget=first_dense", "config_list.0={op_types: [Conv2d], sparse_ratio: 0.5}"],
        "",
        "",
    ),
    "my_method": (["search.method=late_ramp", "search.until=0.5", "search.rounds=2"], "late_ramp", ""),
    "my_data": (["data.name=stripes"], "stripes", "on stripes"),
    "my_comparator": (["comparators={tiny_set: {epochs: 2, lr: 0.05}}"], "tiny_set: 2 epochs", "tiny_set"),
}


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Restore all registries, and forget the modules, at the end of a test."""
    registries: list[Any] = [COMPARATORS, DATASETS, BUDGETS, CRITERIA, METHODS]
    before = [(dict(registry._objects), dict(registry._origins)) for registry in registries]
    yield
    for registry, (objects, origins) in zip(registries, before, strict=True):
        registry._objects, registry._origins = objects, origins
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    return write_file(tmp_path)


def test_each_module_is_short() -> None:
    assert all(source.count("\n") <= 30 for source in MODULES.values())


@pytest.mark.parametrize("module", MODULES)
def test_an_outside_module_by_its_name(
    module: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, planned, reported = USES[module]
    overrides = [f"plugins=[{module}]", *overrides, "finetune.epochs=0"]
    assert command("search", file, *overrides, flags=("--dry-run",)) == 0
    assert planned in capsys.readouterr().out
    assert command("search", file, *overrides) == 0
    printed = capsys.readouterr().out
    assert module != "my_comparator" or "tiny_set" in printed
    assert command("search", file, *overrides) == 0  # is finished: the same settings
    capsys.readouterr()

    # The report of another process, to which the module is unknown.
    folder = tmp_path / "report"
    line = [sys.executable, "-m", "nni_jackpot.cli", "report", str(tmp_path / "out"), "-o", str(folder)]
    made = subprocess.run(line, capture_output=True, text=True, cwd=os.getcwd())
    assert made.returncode == 0, made.stderr
    assert reported in (folder / "report.md").read_text()


def test_python_takes_outside_names(file: Path) -> None:
    load_config(file, {"plugins": ["my_criterion", "my_budget"]})
    model = ConvNet()
    ratio = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    masks = LotteryJackpotPruner(model, ratio, init="signed", budget="first_dense").get_masks()
    kept = {name: mask["weight"].bool() for name, mask in masks.items()}
    assert kept["conv1"].all()
    assert model.conv2.weight[kept["conv2"]].min() >= model.conv2.weight[~kept["conv2"]].max()


def test_python_takes_an_outside_criterion_of_activations(file: Path) -> None:
    load_config(file, {"plugins": ["my_activations", "my_needy_budget"]})
    torch.manual_seed(0)
    model, images = ConvNet(), torch.rand(4, 1, 8, 8)
    model.bn1.weight.data[3] = 0  # the fourth input of conv2 is silent
    ratio = [{"op_names": ["conv2"], "sparse_ratio": 0.125}]
    evaluator = make_evaluator(model, [(images, torch.arange(4) % 3)])
    for options in ({"init": "largest_inputs", "budget": "wanda_sees"}, {"init": CRITERIA["largest_inputs"]}):
        pruner = LotteryJackpotPruner(model, ratio, evaluator, **options)
        mask = pruner.get_masks()["conv2"]["weight"].bool()
        assert not mask[:, 3].any()
        assert mask.sum() == 12 * 7 * 9
        pruner.unwrap_model()


def test_outside_names_in_a_sweep_and_a_search_space(file: Path, tmp_path: Path) -> None:
    fixed: dict[str, object] = {"plugins": ["my_criterion", "my_method"]}
    space = {"search.method": ["late_ramp", "edge_popup"], "search.init": ["signed", "magnitude"]}
    assert len(runs_of(file, fixed, space)) == 4
    fixed_too: dict[str, object] = {"plugins": ["my_activations", "my_needy_budget"]}
    needy = {"search.init": ["largest_inputs", "sparsegpt"], "search.budget": ["wanda_sees", "owl"]}
    assert len(runs_of(file, fixed_too, needy)) == 4
    experiment = {
        "trialCommand": "nni-jackpot search run.yml",
        "searchSpace": {"search.until": {"_type": "choice", "_value": [0.25, 0.5]}},
    }
    (tmp_path / "e.yml").write_text(json.dumps(experiment))
    runs = runs_of(tmp_path / "e.yml", {**fixed, "search.method": "late_ramp", "search.rounds": 3.0})
    assert [config.search.settings.until for _, config in runs] == [0.25, 0.5]
    assert {type(config.search.settings.rounds) for _, config in runs} == {int}


def test_settings_of_an_outside_method_are_checked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["plugins=[my_method]", "search.method=late_ramp"]
    for wrong, words in (
        ("search.until=2", "search.until: found 2 (int), allowed: null or a number >= 0 and <= 1"),
        ("search.untl=1", "unknown key 'untl'"),
        ("search.kept_score=1", "unknown key 'kept_score'"),
        ("search.recipe=paper", "search.recipe: found 'paper' (str), allowed: a string out of default"),
    ):
        assert command("search", file, *chosen, wrong) == 2
        assert words in capsys.readouterr().err


def test_a_comparator_keeps_its_budget_and_resumes(file: Path, tmp_path: Path) -> None:
    from interruption import stopping

    from nni_jackpot.experiment.run import search

    settings = {"epochs": 3, "lr": 0.05, "from_scratch": True}
    given = {"plugins": ["my_comparator"], "comparators": {"tiny_set": settings}, "finetune.epochs": 0}
    whole = search(load_config(file, {**given, "output": str(tmp_path / "whole")}))
    rows = {row.kind: row for row in whole.rows}
    assert rows["tiny_set"].sparsity == rows["initial"].sparsity
    assert rows["tiny_set"].epochs == 3
    config = load_config(file, given)
    with stopping(at=2 * 1 + 2 * 2 + 2 * 2 - 1), pytest.raises(KeyboardInterrupt):  # of steps, two an epoch
        search(config)
    saved = torch.load(tmp_path / "out" / "comparators" / "tiny_set" / "epoch.pth", weights_only=True)
    assert saved["parts"]["masks"]["memory"]["updates"] >= 1
    assert search(config).rows == whole.rows
    assert not list((tmp_path / "out").rglob("epoch.pth"))
    # Of other comparators nothing is left.
    search(load_config(file, {"finetune.epochs": 0}), overwrite=True)
    assert not (tmp_path / "out" / "comparators").exists()


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ("[nowhere_at_all]", "plugins.0: cannot import 'nowhere_at_all': ModuleNotFoundError"),
        ("[broken]", "plugins.0: cannot import 'broken': ZeroDivisionError: division by zero"),
        ("[my_data, '../x']", "plugins: found"),
        ("my_data", "plugins: found 'my_data' (str), allowed: a list of names of modules"),
        ("[json]", "plugins.0: 'json' is "),
    ],
)
def test_plugins_that_cannot_be_imported(
    plugins: str, words: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "broken.py").write_text("1 / 0")
    (file.parent / "json.py").write_text("")
    before = list(sys.path)
    assert command("search", file, f"plugins={plugins}") == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert sys.path == before


def test_a_run_of_another_version_of_a_plugin_is_not_overwritten(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = "plugins=[my_method, my_comparator]", "search.method=late_ramp", "finetune.epochs=0"
    compared = "comparators={tiny_set: {epochs: 1, lr: 0.05}}"
    assert command("search", file, *chosen, compared) == 0
    for module, old, new in (("my_method", "until", "end"), ("my_comparator", "every", "interval")):
        source = (file.parent / f"{module}.py").read_text()
        (file.parent / f"{module}.py").write_text(source.replace(old, new))
        sys.modules.pop(module)
        capsys.readouterr()
        assert command("search", file, *chosen, compared) == 2
        said = capsys.readouterr().err
        assert "holds a finished run of other settings: " in said
        assert f".{new} was None and is " in said


def test_a_report_imports_nothing(file: Path, tmp_path: Path) -> None:
    assert command("search", file, "plugins=[my_criterion]", "search.init=signed", "finetune.epochs=0") == 0
    (tmp_path / "out" / "my_criterion.py").write_text("raise SystemExit(3)")
    sys.modules.pop("my_criterion")
    assert cli.main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "report")]) == 0
