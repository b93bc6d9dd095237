from __future__ import annotations

import pytest
from support_table import SECTIONS, TABLE, Run, base, table


@pytest.fixture(scope="module")
def collected() -> Run:
    run = Run("--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:faulthandler")
    assert run.exit_code == 0
    return run


def test_every_feature_is_tested(collected: Run) -> None:
    tested = {base(feature) for feature, _ in collected.tests}
    # NNI's keys and the names of criteria and budgets come from their own registries
    assert tested == {name for names in SECTIONS.values() for name in names}


def test_no_feature_is_both_honoured_and_refused(collected: Run) -> None:
    features = [feature for feature, _ in collected.tests]
    assert len(set(features)) == len(features)


def test_the_table_is_what_the_tests_say(collected: Run) -> None:
    assert TABLE.read_text(encoding="utf-8") == table(collected), "run: python tests/support_table.py"
