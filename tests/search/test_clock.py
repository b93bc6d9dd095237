from __future__ import annotations

import pytest

from nni_jackpot.search.clock import SearchClock, cosine


def test_cosine_falls_from_one_to_zero() -> None:
    assert cosine(0.0) == 1.0
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1.0) == pytest.approx(0.0)


def test_progress_in_steps() -> None:
    clock = SearchClock(max_steps=4, max_epochs=None)
    seen = []
    for _ in range(6):
        seen.append(clock.progress())
        clock.step += 1
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_progress_in_epochs_learns_the_length_of_an_epoch() -> None:
    clock = SearchClock(max_steps=None, max_epochs=3)
    seen = []
    for _ in range(3):
        clock.begin_epoch()
        for _ in range(2):
            seen.append(round(clock.progress(), 4))
            clock.step += 1
    assert seen == [0.0, 0.0, 0.3333, 0.5, 0.6667, 0.8333]
