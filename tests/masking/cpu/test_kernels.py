"""The kernels against the same arithmetic in PyTorch."""

from __future__ import annotations

import logging
import math
import threading

import pytest
import torch
from torch import Tensor

from nni_jackpot.masking.cpu import kernels
from nni_jackpot.masking.cpu.kernels import Step, address, can_run, in_parallel, library

# Float32 has 24 bits; a number that takes a handful of operations is off by a few of the last ones.
CLOSE = {"rtol": 8 * 2.0**-24, "atol": 8 * 2.0**-24}
LENGTHS = [1, 15, 16, 17, 1023, 1024, 1025, 5000]


@pytest.fixture(autouse=True)
def built() -> None:
    if library() is None:
        pytest.skip("no C compiler")


def some(count: int, length: int) -> list[Tensor]:
    return list(torch.randn(count, length, generator=torch.Generator().manual_seed(length)))


def moved(grad: Tensor, momentum: Tensor, score: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    new = momentum * step.momentum + (grad * step.factor + score * step.weight_decay)
    return new, score - step.lr * new


@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_is_that_of_sgd(length: int) -> None:
    grad, momentum, score, weight = some(4, length)
    masked, step = torch.empty(length), Step(2.0, 0.9, 0.05, 0.01, 0.25, 4.0)
    hard = momentum.clone(), score.clone()
    expected = moved(grad, momentum, score, step)
    library().move(address(grad, 0), *(address(t, 0) for t in hard), length, step)
    places = [address(t, 0) for t in (grad, momentum, score)]
    library().move_softly(*places, length, step, address(weight, 0), address(masked, 0))
    for found in (hard, (momentum, score)):
        torch.testing.assert_close(found[0], expected[0], **CLOSE)
        torch.testing.assert_close(found[1], expected[1], **CLOSE)
    # An error of the score's last bit is multiplied by the slope.
    soft = torch.sigmoid((score.double() - 0.25) * 4) * weight.double()
    torch.testing.assert_close(masked.double(), soft, rtol=1e-5, atol=1e-6)


def soft_masks(scores: Tensor, slope: float) -> Tensor:
    """Return the soft masks of scores that do not move."""
    grad, momentum = torch.zeros(2, len(scores))
    ones, masked = torch.ones_like(scores), torch.empty_like(scores)
    places = [address(t, 0) for t in (grad, momentum, scores)]
    step = Step(1.0, 0.9, 0.0, 0.0, 0.0, slope)
    library().move_softly(*places, len(scores), step, address(ones, 0), address(masked, 0))
    return masked


def test_the_sigmoid_is_close_everywhere() -> None:
    scores = torch.linspace(-80, 80, 100_001)
    expected = torch.sigmoid(scores.double())
    error = (soft_masks(scores.clone(), 1.0).double() - expected) / expected
    assert error.abs().max() < 1e-5  # the argument of exp has an error of 80 * 2**-24
    near = scores.abs() < 1
    assert error[near].abs().max() < 1e-6


def test_the_sigmoid_of_extremes_is_a_number_and_of_nan_is_nan() -> None:
    scores = torch.tensor([1e30, -1e30, 0.0] * 10)
    found = soft_masks(scores, 1e12)
    assert torch.equal(found[::3], torch.ones(10))
    assert found[1::3].max() < 1e-37
    assert torch.equal(found[2::3], torch.full((10,), 0.5))
    assert found.isfinite().all()
    assert soft_masks(torch.full((40,), math.nan), 1.0).isnan().all()


@pytest.mark.parametrize("length", LENGTHS)
def test_squares_are_summed(length: int) -> None:
    (numbers,) = some(1, length)
    found = library().square(address(numbers, 0), length)
    assert math.isclose(found, numbers.double().square().sum(), rel_tol=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 144])
def test_a_sample_moves_as_all_do(stride: int) -> None:
    grad, momentum, score = some(3, 5000)
    step, count = Step(2.0, 0.9, 0.05, 0.01), -(-5000 // stride)
    out, places = torch.empty(count), [address(t, 0) for t in (grad, momentum, score)]
    library().sample(*places, count, step, stride, address(out, 0))
    library().move(*places, 5000, step)
    torch.testing.assert_close(out, score[::stride], **CLOSE)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[1], [1023, 1, 5000], [4096, 0, 4096], [0], [], [3] * 50])
def test_ranges_cover_every_number_once(
    threads: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    counts, lock = [torch.zeros(size) for size in sizes], threading.Lock()

    def work(number: int, begin: int, end: int) -> float:
        with lock:
            counts[number][begin:end] += 1
        return float(end - begin)

    assert in_parallel(sizes, work) == sizes
    assert all(torch.equal(count, torch.ones_like(count)) for count in counts)


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def work(number: int, begin: int, end: int) -> None:
        if begin:
            raise ValueError("a range")

    with pytest.raises(ValueError, match="a range"):
        in_parallel([1 << 14], work)


def test_what_the_kernels_cannot_take_is_known() -> None:
    fit = torch.zeros(4, 4)
    assert can_run(fit, fit)
    assert not can_run(fit, fit.T[:2])
    assert not can_run(fit, fit.double())
    assert not can_run(torch.zeros(2, device="meta"))


def test_without_a_compiler_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    library.cache_clear()
    with caplog.at_level(logging.INFO):
        assert library() is None
    library.cache_clear()
    assert "no C compiler" in caplog.text


def test_a_compiler_that_miscompiles_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels._build()

    class Wrong:
        def move_softly(self, *arguments: object) -> None:
            real.move(*arguments[:5])

    monkeypatch.setattr(kernels, "_build", Wrong)
    library.cache_clear()
    assert library() is None
    library.cache_clear()
