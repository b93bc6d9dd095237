"""A search in your own loop: begin, step, finish."""

from __future__ import annotations

import copy
import gc
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, make_evaluator, same, training_step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Supermask
from nni_jackpot.errors import JackpotError, NothingSearchedError, SearchDivergedError

CONV = {"op_types": ["Conv2d"], "sparse_ratio": 0.8}
SEARCHES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "ramp, soft masks, reallocation": ([{**CONV, "global_group_id": 0}], {}),
    "paper": ([CONV], {"method": EdgePopup.paper(lr=2.0)}),
    "limited swaps": ([CONV], {"method": EdgePopup.paper(lr=2.0, swap_limit=0.05)}),
    "supermask": ([CONV], {"method": Supermask(lr=0.2)}),
    "N:M": ([{"op_names": ["conv2"], "sparse_pattern": "2:4"}], {}),
    "channels": ([{**CONV, "sparse_ratio": 0.5, "granularity": "out_channel"}], {"norm": "freeze"}),
}


def own_loop(
    pruner: LotteryJackpotPruner, model: nn.Module, batches: Batches, steps: int, stop: int | None = None
) -> Any:
    search = pruner.begin(total_steps=steps)
    for step in range(stop or steps):
        loss = training_step(batches[step % len(batches)], model)
        loss.backward()
        search.step(loss)
    return search


@pytest.mark.parametrize("name", SEARCHES)
def test_the_masks_are_those_of_the_evaluator_s_loop(name: str, model: ConvNet, batches: Batches) -> None:
    config_list, options = SEARCHES[name]
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    pruner = LotteryJackpotPruner(model, config_list, make_evaluator(model, batches), **options)
    start = pruner.get_masks()
    _, expected = pruner.compress(max_steps=20)
    torch.manual_seed(0)
    pruner = LotteryJackpotPruner(twin, config_list, **options)
    masks = own_loop(pruner, twin, batches, 20).finish()
    assert not same(start, masks)
    assert same(masks, expected)
    statistics = {name: value for name, value in model.state_dict().items() if "running" in name}
    assert all(torch.equal(twin.state_dict()[name], value) for name, value in statistics.items())


def test_what_is_left_is_pruned_if_the_loop_is_cut_short(model: ConvNet, batches: Batches) -> None:
    pruner = LotteryJackpotPruner(model, [CONV])
    masks = own_loop(pruner, model, batches, 100, stop=3).finish()
    assert [int((m["weight"] == 0).sum()) for m in masks.values()] == [57, 691]


def test_a_search_continues_from_its_state(model: ConvNet, batches: Batches) -> None:
    twin = copy.deepcopy(model)
    whole = own_loop(LotteryJackpotPruner(model, [CONV]), model, batches, 20).finish()
    pruner = LotteryJackpotPruner(twin, [CONV])
    search = own_loop(pruner, twin, batches, 20, stop=8)
    saved = copy.deepcopy((twin.state_dict(), search.state_dict()))
    for step in range(8, 11):  # lost
        training_step(batches[step % len(batches)], twin).backward()
        search.step()
    search = pruner.begin(total_steps=20)
    twin.load_state_dict(saved[0])
    search.load_state_dict(saved[1])
    for step in range(8, 20):
        training_step(batches[step % len(batches)], twin).backward()
        search.step()
    assert same(search.finish(), whole)


def test_the_state_of_another_search_is_refused(model: ConvNet, batches: Batches) -> None:
    pruner = LotteryJackpotPruner(model, [CONV])
    search = own_loop(pruner, model, batches, 4)
    state = search.state_dict()
    del state["masks"]["conv1.weight"]
    with pytest.raises(ValueError, match="other targets"):
        search.load_state_dict(state)


def test_a_loss_that_is_nan_keeps_the_last_good_masks(model: ConvNet, batches: Batches) -> None:
    pruner = LotteryJackpotPruner(model, [CONV], method=EdgePopup.paper(lr=2.0))
    search = own_loop(pruner, model, batches, 20, stop=4)
    training_step(batches[4], model)  # a forward under the masks of the last step
    good = pruner.get_masks()
    search.step(training_step(batches[4], model))
    with pytest.raises(SearchDivergedError, match=r"at step 6 .* keeps the last masks"):
        search.step(torch.tensor(torch.nan))
    assert same(pruner.get_masks(), good)


def test_a_loop_without_a_step_is_refused(model: ConvNet) -> None:
    search = LotteryJackpotPruner(model, [CONV]).begin(total_steps=3)
    with pytest.raises(NothingSearchedError, match="took no step"):
        search.finish()


@pytest.mark.parametrize("steps", [0, -1, 2.5, None, True])
def test_a_length_that_is_not_one_is_refused(steps: Any, model: ConvNet) -> None:
    with pytest.raises(ValueError, match="total_steps must be"):
        LotteryJackpotPruner(model, [CONV]).begin(total_steps=steps)


def test_an_unwrapped_model_is_refused(model: ConvNet) -> None:
    pruner = LotteryJackpotPruner(model, [CONV])
    pruner.unwrap_model()
    with pytest.raises(ValueError, match=r"wrap_model\(\)"):
        pruner.begin(total_steps=3)


# -- norm statistics


def test_statistics_are_those_of_the_hard_masks(model: ConvNet, batches: Batches) -> None:
    seen: list[torch.Tensor] = []
    model.bn1.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().mean((0, 2, 3))))
    momentum = model.bn1.momentum
    pruner = LotteryJackpotPruner(model, [CONV], method=EdgePopup(anneal_end=0.5))
    own_loop(pruner, model, batches, 20).finish()
    torch.testing.assert_close(model.bn1.running_mean, torch.stack(seen[11:]).mean(0))
    assert model.bn1.momentum == momentum


def test_a_search_too_short_for_statistics_says_so(
    model: ConvNet, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = LotteryJackpotPruner(model, [CONV])
    search = own_loop(pruner, model, batches, 3)
    twin = copy.deepcopy(model)
    search.finish()
    assert "too short for batch-norm statistics" in caplog.text
    pruner.reestimate_norm(batches)
    once = model.bn1.running_mean.clone()
    pruner.reestimate_norm(batches)
    assert torch.equal(once, model.bn1.running_mean)
    assert not torch.equal(once, twin.bn1.running_mean)


def test_a_short_search_with_norm_batches_does_not_warn(
    model: ConvNet, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = LotteryJackpotPruner(model, [CONV])
    own_loop(pruner, model, batches, 3).finish(norm_batches=batches)
    assert "too short for batch-norm statistics" not in caplog.text


@pytest.mark.parametrize("options", [{"norm": "freeze"}, {"method": EdgePopup.paper()}])
def test_other_statistics_are_left_alone(
    options: dict[str, Any], model: ConvNet, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    tracked = model.bn1.num_batches_tracked.clone()
    own_loop(LotteryJackpotPruner(model, [CONV], **options), model, batches, 6).finish()
    steps = 0 if "norm" in options else 6
    assert model.bn1.num_batches_tracked == tracked + steps
    assert not caplog.text


# -- two processes


def _rank(rank: int, port: int, batches: Batches, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)

    def search_wrapped(by: str) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
        wrapped = DistributedDataParallel(model) if by == "before" else model
        pruner = LotteryJackpotPruner(wrapped, [{"op_types": ["Linear"], "sparse_ratio": 0.7}])
        if by == "after":
            wrapped = DistributedDataParallel(model)
        search = pruner.begin(total_steps=8)
        for step in range(8):
            images, labels = batches[step % len(batches)]
            training_step((images[rank::2], labels[rank::2]), wrapped).backward()
            search.step()
        return search.finish()

    with pytest.raises(JackpotError, match="wrap the model by DistributedDataParallel after that"):
        search_wrapped("before")
    torch.save(search_wrapped("after"), Path(folder, f"{rank}.pt"))
    gc.collect()  # wrapped models hold the process group
    torch.distributed.destroy_process_group()


def test_processes_with_different_gradients_are_refused(batches: Batches, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    doubles = [(images.double(), labels) for images, labels in batches]
    torch.multiprocessing.spawn(_rank, (port, doubles, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first, second)


def test_steps_before_another_optimizer_s_under_a_gradient_scaler(model: ConvNet, batches: Batches) -> None:
    """A step whose gradients are not finite is skipped; powers of two leave all other gradients exact."""
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    expected = own_loop(LotteryJackpotPruner(model, [CONV]), model, batches, 10).finish()
    torch.manual_seed(0)
    pruner = LotteryJackpotPruner(twin, [CONV])
    search = pruner.begin(total_steps=10)
    driver = torch.optim.AdamW(pruner.score_parameters(), lr=1.0)
    driver.register_step_pre_hook(lambda optimizer, *_: search.step_before(optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(10):
        if step == 4:
            scaler.scale(training_step(batches[0], twin) * float("inf")).backward()
            scaler.step(driver)
            scaler.update()
            driver.zero_grad()
        scaler.scale(training_step(batches[step % len(batches)], twin)).backward()
        scaler.step(driver)
        scaler.update()
    assert same(search.finish(), expected)
    assert not driver.state
