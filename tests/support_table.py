"""Writes docs/support.md from a run of the tests: what is honoured, what is refused, and which tests say so.

Tests are marked ``honours("feature", ...)`` where they check that features do what they say, and
``refuses("feature", ...)`` where they check that asking for them is an error of its own. `SECTIONS` has the
features; a mark may narrow one down after a comma ("apply_method: add, of weights") and name a parameter of its
test ("init: {criterion}"). Run me to write the table; it is not written unless all marked tests pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from nni.compression import quantization
from nni.compression.base.config import default_config_schema
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX, PruningSetting
from schema import Or

from nni_jackpot.masking.budgets import BUDGETS
from nni_jackpot.masking.criteria import CRITERIA

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "support.md"
# Marks around the part of the page that architectures_table.py writes; this file leaves it unchanged.
ARCHITECTURES_BEGIN, ARCHITECTURES_END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
VERBS = {"honours": "honoured", "refuses": "refused"}

HEAD = """# What is supported

What NNI 3.0's config list, evaluators and chains offer, and whether `LotteryJackpotPruner` honours it or
refuses it with an error that says why. Written by `python tests/support_table.py` from a run of the tests named
here, all of which passed. NNI's `DeepspeedTorchEvaluator` is not tested.
"""


def config_keys() -> list[str]:
    """Return every key of NNI's schema for pruning; every value where there is a choice of names."""
    found = []
    for key, value in default_config_schema("pruning").schema.items():
        key = getattr(key, "schema", key)  # of Optional
        values = value.args if isinstance(value, Or) else ()
        if key == "target_names":
            values = (*PruningSetting.default_setting, INPUT_PREFIX, OUTPUT_PREFIX)
        if any(isinstance(name, str) for name in values):
            found += [f"{key}: {getattr(name, '__name__', name)}" for name in values]
        else:
            found += key.args if isinstance(key, Or) else [key]
    return found


SECTIONS = {
    "NNI's config list": config_keys(),
    "NNI's config list before 3.0": [
        "sparsity",
        "sparsity_per_layer",
        "total_sparsity",
        "max_sparsity_per_layer",
        "op_partial_names",
        "exclude",
    ],
    "Beyond NNI's config list": ["sparse_pattern"],
    "Where the search starts": [*(f"init: {name}" for name in CRITERIA), "init: masks"],
    "How zeros are shared out": [f"budget: {name}" for name in BUDGETS],
    "Evaluators": ["TorchEvaluator", "LightningEvaluator", "TransformersEvaluator", "JackpotCallback"],
    "Training loops": [
        "max_steps",
        "max_epochs",
        "gradient accumulation",
        "gradient clipping",
        "mixed precision",
        "several optimizers",
        "learning rate schedulers",
        "DistributedDataParallel",
        "a loop of your own",
        "resume",
    ],
    "Chains": [
        "DynamicLayerwiseDistiller",
        "Adaptive1dLayerwiseDistiller",
        *quantization.__all__,
        "LinearPruner",
        "AGPPruner",
        "other pruners",
        "auto_set_denpendency_group_ids",
        "ModelSpeedup",
    ],
}


class Run:
    """A plugin of pytest that keeps what a run has of marked tests."""

    def __init__(self, *options: str) -> None:
        self.tests: dict[tuple[str, str], list[str]] = {}
        """Links to the tests by feature and verb."""
        self.not_passed: list[str] = []
        self.exit_code = pytest.main([str(TESTS), "-n0", *options], plugins=[self])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            link = f"[{item.originalname}](../tests/{item.path.relative_to(TESTS)})"
            for verb in VERBS:
                for feature in (name for mark in item.iter_markers(verb) for name in mark.args):
                    links = self.tests.setdefault((feature.format(**parameters), verb), [])
                    if link not in links:
                        links.append(link)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.not_passed.append(report.nodeid)


def base(feature: str) -> str:
    """Return what a feature is in `SECTIONS`."""
    return feature.partition(", ")[0]


def table(run: Run) -> str:
    """Return docs/support.md."""

    def rows(name: str) -> Iterable[str]:
        code = name if " " in name.replace(": ", "") else f"`{name}`"
        for (feature, verb), links in sorted(run.tests.items()):
            if base(feature) == name:
                yield f"| {feature.replace(name, code, 1)} | {VERBS[verb]} | {', '.join(sorted(links))} |"

    lines = [HEAD]
    for title, names in SECTIONS.items():
        lines += [f"## {title}\n", "| | | tested by |", "|---|---|---|"]
        lines += [row for name in names for row in rows(name)] + [""]
    return "\n".join(lines) + architectures_part()


def architectures_part() -> str:
    """Return the part of docs/support.md that architectures_table.py has written."""
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    _, begin, rest = text.partition(ARCHITECTURES_BEGIN)
    return begin + rest.partition(ARCHITECTURES_END)[0] + f"{ARCHITECTURES_END}\n" if begin else ""


if __name__ == "__main__":
    run = Run("-q", "-m", " or ".join(VERBS))
    if run.exit_code or run.not_passed:
        sys.exit(f"{TABLE} is not written: {', '.join(run.not_passed) or 'see above'}")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(run), encoding="utf-8")
