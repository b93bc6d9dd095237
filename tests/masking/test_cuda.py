"""What holds on a CPU holds on a GPU, and the host waits for the GPU no more often the more layers there are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import known_optimum
import pytest
import torch
from conftest import (
    CONFIG_LIST,
    Batches,
    ConvNet,
    dense_of,
    doubles,
    expected_zeros,
    frozen,
    make_evaluator,
    same,
    training_step,
    zeros,
)
from resumption import check_resumed
from test_topk import check_update_tops, every_kind
from torch import nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Method, Supermask
from nni_jackpot.cli import main
from nni_jackpot.experiment.folder.result import load_result

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Found = dict[str, dict[str, torch.Tensor | None]]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have convolutions compute the same gradients every time; commands see to it themselves."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def on_gpu(batches: Batches) -> Batches:
    return [(images.cuda(), labels.cuda()) for images, labels in batches]


def search(
    batches: Batches,
    steps: int = 24,
    config: dict[str, Any] | None = None,
    step: Callable[..., Any] = training_step,
    **options: Any,
) -> tuple[LotteryJackpotPruner, Found, Found]:
    """Search on the GPU; return the pruner, and the masks before and after."""
    torch.manual_seed(0)
    model = ConvNet().cuda()
    dense = dense_of(model)
    entry = {key: value for key, value in {**CONFIG_LIST[0], **(config or {})}.items() if value is not None}
    pruner = LotteryJackpotPruner(model, [entry], make_evaluator(model, batches, step), **options)
    start = pruner.get_masks()
    masks = pruner.compress(steps, None)[1]
    assert frozen(model, dense)
    return pruner, start, masks


METHODS = {"paper": EdgePopup.paper, "defaults": EdgePopup, "supermask": Supermask}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
def test_a_search(on_gpu: Batches, method: Callable[..., Method]) -> None:
    settings = method(lr=2.0 if method == EdgePopup.paper else 0.1)
    pruner, start, masks = search(on_gpu, method=settings)
    assert masks["conv1"]["weight"].device == on_gpu[0][0].device
    assert zeros(pruner) == expected_zeros(ConvNet())
    assert not same(start, masks)
    assert pruner.flips >= 0
    assert same(masks, search(on_gpu, method=settings)[2])


@every_method
@pytest.mark.parametrize(
    "config",
    [
        {"granularity": "out_channel"},
        {"granularity": [2, 2, 1, 1], "op_names": ["conv2"], "op_types": ["Conv2d"]},
        {"sparse_pattern": "2:4", "op_names": ["conv2"], "op_types": ["Conv2d"], "sparse_ratio": None},
        {"global_group_id": 0},
    ],
    ids=["channels", "blocks", "2:4", "global"],
)
def test_every_granularity(on_gpu: Batches, config: dict[str, Any], method: Callable[..., Method]) -> None:
    pruner, start, _ = search(on_gpu, 12, config, method=method(lr=0.1))
    before = sum(int((mask["weight"] == 0).sum()) for mask in start.values())
    assert sum(zeros(pruner).values()) == before


def test_short_restriction(on_gpu: Batches) -> None:
    pruner, start, masks = search(on_gpu, method=EdgePopup.paper(lr=2.0, swap_limit=0.05))
    assert zeros(pruner) == expected_zeros(ConvNet())
    assert not same(start, masks)


@pytest.mark.parametrize("init", ["snip", "grasp", "random"])
def test_criteria(on_gpu: Batches, init: str) -> None:
    pruner, _, _ = search(on_gpu, 3, init=init)
    assert zeros(pruner) == expected_zeros(ConvNet())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(on_gpu: Batches, dtype: torch.dtype) -> None:
    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        with torch.autocast("cuda", dtype):
            return training_step(batch, model)

    pruner, start, masks = search(on_gpu, step=step, method=EdgePopup(lr=0.1))
    assert zeros(pruner) == expected_zeros(ConvNet())
    assert not same(start, masks)
    assert all(score.dtype == torch.float32 for score in pruner.score_parameters())


@pytest.mark.parametrize("method", [EdgePopup.paper(lr=0.5), EdgePopup(lr=0.5)], ids=["paper", "defaults"])
@pytest.mark.parametrize("how", ["channels last", "compiled"])
def test_another_order_of_sums_finds_the_same_mask(on_gpu: Batches, method: Method, how: str) -> None:
    def found(is_plain: bool) -> Found:
        torch.manual_seed(0)
        model = ConvNet().double().cuda()
        function: Callable[..., Any] = model
        if not is_plain and how == "channels last":
            model.to(memory_format=torch.channels_last)
        elif not is_plain:
            torch._dynamo.reset()
            function = torch.compile(model)
        evaluator = make_evaluator(
            model, doubles(on_gpu), lambda batch, model: training_step(batch, function)
        )
        pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=method)
        start = pruner.get_masks()
        masks = pruner.compress(12, None)[1]
        assert zeros(pruner) == expected_zeros(model)
        assert not same(start, masks)
        return masks

    assert same(found(is_plain=True), found(is_plain=False))


@pytest.mark.parametrize("method", [EdgePopup.paper(), EdgePopup(), Supermask(lr=3.0)], ids=METHODS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_search_finds_the_best_mask(method: Method, compiled: bool) -> None:
    model = known_optimum.layer().cuda()
    torch._dynamo.reset()
    function = torch.compile(model) if compiled else model
    batches = [(inputs.cuda(), labels.cuda()) for inputs, labels in known_optimum.batches()]
    evaluator = make_evaluator(
        model, batches, lambda batch, model: known_optimum.training_step(batch, function)
    )
    pruner = LotteryJackpotPruner(model, known_optimum.CONFIG_LIST, evaluator, method=method)
    masks = pruner.compress(24, None)[1]
    assert torch.equal(masks["0"]["weight"].bool().cpu(), known_optimum.BEST)


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.flatten(1))


@every_method
@pytest.mark.filterwarnings("ignore")
def test_waits_do_not_depend_on_the_number_of_layers(on_gpu: Batches, method: Callable[..., Method]) -> None:
    def waits(depth: int) -> int:
        """Return how often the host waits for the device between the 6th step and the 18th."""
        torch.manual_seed(0)
        model = Deep(depth).cuda()
        seen: list[int] = []

        def step(batch: Any, model: nn.Module) -> torch.Tensor:
            seen.append(len(caught))
            return training_step(batch, model)

        config = [{"op_types": ["Linear"], "sparse_ratio": 0.7}]
        pruner = LotteryJackpotPruner(model, config, make_evaluator(model, on_gpu, step), method=method())
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pruner.compress(18, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert "synchronizing" in str(caught[-1].message)
        return seen[17] - seen[5]

    few, many = waits(2), waits(8)
    assert few == many
    assert many <= 2 * 12  # a look at the loss, and one at all masks


@every_method
def test_flips_are_counted_by_one_wait(on_gpu: Batches, method: Callable[..., Method]) -> None:
    pruner, _, _ = search(on_gpu, 6, method=method(lr=0.1))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            assert pruner.flips >= 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1


@every_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_selection(make: Callable[..., torch.Tensor], rows: int) -> None:
    check_update_tops(make, rows, "cuda")


def test_moves_to_the_gpu_after_it_was_wrapped(on_gpu: Batches) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    dense = dense_of(model)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    start = pruner.get_masks()
    model.cuda()
    optimizer = torch.optim.SGD(pruner.score_parameters(), lr=2.0, momentum=0.9, fused=True)
    for batch in on_gpu:
        training_step(batch, model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert zeros(pruner) == expected_zeros(model)
    assert not same(start, pruner.get_masks())
    pruner.unwrap_model()
    assert frozen(model.cpu(), dense)


@every_method
@pytest.mark.parametrize("dropout", [0.0, 0.3])  # whose random numbers come from the GPU's own generator
def test_resumes_where_it_was(
    on_gpu: Batches, tmp_path: Path, dropout: float, method: Callable[..., Method]
) -> None:
    options = {"device": "cuda", "dropout": dropout, "method": method(lr=0.1)}
    check_resumed(on_gpu, tmp_path / "checkpoint.pth", 11, **options)


DIGITS = """
seed: 0
output: {folder}
device: cuda
data: {{name: digits, batch_size: 64}}
model: {{name: resnet, depth: 8, width: 8}}
pretrain: {{epochs: 2, lr: 0.1, cache: {cache}}}
config_list: [{{op_types: [Conv2d], sparse_ratio: 0.8, global_group_id: 0}}]
search: {{epochs: 2}}
finetune: {{epochs: 1, lr: 0.05}}
"""


def test_a_command_gives_the_same_masks_twice(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        config = tmp_path / f"{name}.yml"
        text = DIGITS.format(folder=tmp_path / name, cache=tmp_path / "cache")
        config.write_text(text, encoding="utf-8")
        assert main(["search", str(config)]) == 0
        found.append(torch.load(tmp_path / name / "masks.pth", weights_only=True))
        assert load_result(tmp_path / name).overlap < 1.0
    assert same(*found)
    assert not any(mask["weight"].is_cuda for mask in found[0].values())
