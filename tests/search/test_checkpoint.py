"""A search that is interrupted, by whatever means, ends as if it had not been."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CONFIG_LIST,
    NET_ONLY,
    Batches,
    lightning_evaluator,
    make_evaluator,
    same,
    training_step,
)
from resumption import Interrupted, Net, Script, check_resumed, noisy_step, step_of_dicts
from torch import Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Patterns, Supermask
from nni_jackpot.errors import CheckpointError, OutputFolderError, SearchDivergedError

PATTERN = [{"op_names": ["conv2"], "sparse_pattern": "2:4"}]


@pytest.mark.honours("resume")
@pytest.mark.parametrize("stop_after", [1, 3, 4, 11, 19])
def test_resumes_where_it_was(batches: Batches, tmp_path: Path, stop_after: int) -> None:
    resumed = check_resumed(batches, tmp_path / "search.pth", stop_after)
    assert resumed.pruner.resumed_step == stop_after // 3 * 3
    assert resumed.forwards == 20 - stop_after // 3 * 3  # nothing is computed twice


@pytest.mark.honours("resume")
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3},
        {"step": step_of_dicts},
        {"step": noisy_step},
        {"length": (None, 3)},
        {"agp": True},
        {"init": "snip"},
        {"init": "random"},
        {"method": EdgePopup.paper(lr=5.0, swap_limit=0.05)},
        {"method": EdgePopup(lr=5.0, ramp_end=0.8)},
        {"method": EdgePopup(lr=5.0, ramp_end=0.8, anneal_end=0.3)},
        {"method": EdgePopup(lr=5.0, ramp_end=1.0), "budget": "global_rank"},
        {"budget": "global_rank", "length": (200, None)},  # with steps between rankings
        {"optimizer": lambda scores: torch.optim.Adam(scores, lr=0.01)},
        {"method": EdgePopup(lr=5.0, momentum=0.0)},
        {"method": Supermask(lr=0.3)},
        {"method": Supermask(lr=0.3), "dropout": 0.3},
        {"method": Supermask.paper(lr=300.0), "length": (None, 3)},
        {"method": Patterns(lr=0.3), "config_list": PATTERN},
        {"norm": "tune"},
    ],
    ids=lambda options: ", ".join(
        f"{k}={getattr(v, '__name__', getattr(v, 'name', v))}" for k, v in options.items()
    ),
)
def test_resumes_whatever_the_search_is(batches: Batches, tmp_path: Path, options: dict[str, Any]) -> None:
    check_resumed(batches, tmp_path / "search.pth", 10, **options)


@pytest.mark.parametrize("ramp_end", [0.5, 1.0])
def test_resumes_after_the_last_step(batches: Batches, tmp_path: Path, ramp_end: float) -> None:
    options = {"budget": "global_rank", "method": EdgePopup(lr=5.0, ramp_end=ramp_end), "every": 20}
    check_resumed(batches, tmp_path / "search.pth", 20, **options)


def test_is_interrupted_twice(batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "search.pth"
    with pytest.raises(Interrupted):
        Script(batches, path, stop_after=7)
    check_resumed(batches, path, 14)


def test_a_run_that_was_not_interrupted_is_the_same_with_a_checkpoint(
    batches: Batches, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "search.pth"
    script = Script(batches, path)
    assert same(script.masks, Script(batches, None).masks)
    assert script.pruner.resumed_step == 0
    assert not list(path.parent.iterdir())


@pytest.mark.honours("resume", "LightningEvaluator")
@pytest.mark.parametrize("length", [(12, None), (None, 2)])
def test_resumes_under_lightning(batches: Batches, tmp_path: Path, length: tuple) -> None:
    def run(path: Path | None, stop_after: int = -1) -> tuple[LotteryJackpotPruner, Any]:
        torch.manual_seed(0)
        losses = iter(range(1, 100))

        def stop(*_: Any) -> None:
            if next(losses) == stop_after:
                raise Interrupted

        net = Net(0.2)
        net.register_forward_hook(stop)
        module, evaluator = lightning_evaluator(net, batches, default_root_dir=str(tmp_path))
        pruner = LotteryJackpotPruner(module, NET_ONLY, evaluator, method=EdgePopup(lr=5.0))
        if path is not None:
            pruner.checkpoint_to(path, every=2)
        return pruner, pruner.compress(*length)[1]

    path = tmp_path / "search.pth"
    with pytest.raises(Interrupted):
        run(path, stop_after=8)
    pruner, masks = run(path)
    assert pruner.resumed_step == 6
    assert same(masks, run(None)[1])


def test_lightning_s_manual_optimization_cannot_be_replayed(batches: Batches, tmp_path: Path) -> None:
    module, evaluator = lightning_evaluator(Net(0.0), batches, manual=True, default_root_dir=str(tmp_path))
    pruner = LotteryJackpotPruner(module, NET_ONLY, evaluator)
    pruner.checkpoint_to(tmp_path / "search.pth")
    with pytest.raises(CheckpointError, match="automatic optimization"):
        pruner.compress(4, None)


# -- what is refused


def test_another_search_is_refused_and_told_why(batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "search.pth"
    with pytest.raises(Interrupted):
        Script(batches, path, stop_after=7)
    held = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"lr was '5.0' and is '1.0'\. Remove it") as raised:
        Script(batches, path, method=EdgePopup(lr=1.0))
    assert "momentum" not in str(raised.value)
    with pytest.raises(CheckpointError, match=r"method was 'edge_popup' and is 'supermask'"):
        Script(batches, path, method=Supermask(lr=5.0))
    with pytest.raises(CheckpointError, match=r"max_epochs was None and is 3; max_steps was 20 and is None"):
        Script(batches, path, length=(None, 3))
    assert path.read_bytes() == held


def test_other_weights_are_refused(model: nn.Module, batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "search.pth"
    stop = iter(range(5))

    def step(batch: Any, model: nn.Module) -> Tensor:
        if next(stop, None) is None:
            raise Interrupted
        return training_step(batch, model)

    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches, step))
    pruner.checkpoint_to(path, every=2)
    with pytest.raises(Interrupted):
        pruner.compress(10, None)
    pruner.unwrap_model()
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    again = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches))
    again.checkpoint_to(path, settings={"data": "other"})
    with pytest.raises(CheckpointError, match=r"data was None and is 'other'; weights was '"):
        again.compress(10, None)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_files_are_refused(batches: Batches, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "search.pth"
    if content is None:
        torch.save({"conv1.weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"search\.pth is not a checkpoint of a search"):
        Script(batches, path)


def test_another_loop_is_refused(batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "search.pth"
    with pytest.raises(Interrupted):
        Script(batches, path, stop_after=17, length=(None, 3))
    with pytest.raises(CheckpointError, match="does not reach the step at which"):
        Script(batches[:4], path, length=(None, 3))


def test_a_folder_that_cannot_be_written(batches: Batches, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError):
        Script(batches, tmp_path / "file" / "search.pth")


def test_a_search_that_diverged_is_not_resumed(batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "search.pth"
    calls = iter(range(100))

    def step(batch: Any, model: nn.Module) -> Tensor:
        loss = training_step(batch, model)
        return loss * float("nan") if next(calls) == 7 else loss

    with pytest.raises(SearchDivergedError, match="step 8 of"):
        Script(batches, path, step=step)
    assert not path.exists()


def test_every_must_be_positive(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="every must be positive"):
        LotteryJackpotPruner(model, CONFIG_LIST).checkpoint_to("search.pth", every=0)


# -- kill -9

SCRIPT = """
import signal, sys, time
import nni, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from nni.compression.utils import TorchEvaluator
from nni_jackpot import EdgePopup, LotteryJackpotPruner, save_masks

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
x = torch.randn(256, 20)
loader = DataLoader(TensorDataset(x, (x[:, :2] > 0).long() @ torch.tensor([2, 1])), batch_size=16, shuffle=True)

def train(model, optimizer, training_step, scheduler, max_steps, max_epochs):
    steps = 0
    while True:
        for batch in loader:
            training_step(batch, model).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            print(steps, flush=True)
            if steps == int(sys.argv[4]):
                signal.pause()  # until it is killed, however late that comes
            if steps == max_steps:
                return

def training_step(batch, model):
    time.sleep(0.002)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

optimizer = nni.trace(torch.optim.SGD)(net.parameters(), lr=0.1)
config_list = [{"op_types": ["Linear"], "sparse_ratio": 0.8}]
evaluator = TorchEvaluator(train, optimizer, training_step)
pruner = LotteryJackpotPruner(net, config_list, evaluator, method=EdgePopup(lr=1.0))
pruner.checkpoint_to(sys.argv[1], every=int(sys.argv[3]))
_, masks = pruner.compress(150, None)
save_masks(masks, sys.argv[2])
print("resumed", pruner.resumed_step)
"""


def _run(folder: Path, every: int, wait_at: int = 0) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, "script.py", "search.pth", "masks.pth", str(every), str(wait_at)]
    return subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = _run(folder, 7)
    process.communicate()
    assert process.returncode == 0
    return torch.load(folder / "masks.pth")


@pytest.mark.honours("resume")
@pytest.mark.parametrize("every", [1, 7])  # at 1 it is killed while it writes, more often than not
def test_kill_9_at_a_random_step(tmp_path: Path, every: int, uninterrupted: Any) -> None:
    generator = random.Random(time.time_ns())
    last = generator.randrange(8, 140)
    process = _run(tmp_path, every, last + 4)
    for line in _lines(process):
        if line.strip() == str(last):
            time.sleep(generator.random() * 0.01)  # anywhere within the four steps that follow
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "masks.pth").exists()
    process = _run(tmp_path, every)
    resumed = [int(line.split()[1]) for line in _lines(process) if line.startswith("resumed")]
    assert process.wait() == 0
    assert last - every < resumed[0] <= last + 4
    assert same(torch.load(tmp_path / "masks.pth"), uninterrupted)


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout
