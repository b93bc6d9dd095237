from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG_LIST, HELPERS, ROOT, TESTS, ConvNet, make_evaluator, same
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner, apply_masks, load_ticket, save_ticket
from nni_jackpot.errors import MaskError, OtherBaseError, OutputFolderError, TicketError
from nni_jackpot.masks import sparsity_of
from nni_jackpot.storage.formats.mask_codec import encode
from nni_jackpot.storage.formats.sealed import read_sealed, write_sealed
from nni_jackpot.storage.ticket import KIND

BENCHMARKS = ROOT / "benchmarks"


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def masks() -> dict[str, dict[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1": {"weight": (torch.rand(8, 1, 3, 3, generator=generator) < 0.3).float(), "bias": None},
        "conv2": {"weight": torch.rand(12, 8, 3, 3, generator=generator) < 0.1, "bias": torch.ones(12)},
    }


@pytest.fixture
def path(tmp_path: Path, model: nn.Module, masks: dict) -> Path:
    save_ticket(tmp_path / "a.ticket", masks, model, {"seed": 3})
    return tmp_path / "a.ticket"


def test_masks_come_back_as_they_were(path: Path, masks: dict) -> None:
    found = load_ticket(path).masks
    assert list(found) == list(masks)
    for module, targets in masks.items():
        assert list(found[module]) == list(targets)
        for target, mask in targets.items():
            if mask is None:
                assert found[module][target] is None
            else:
                assert found[module][target].dtype == mask.dtype
                assert torch.equal(found[module][target], mask)


def test_a_ticket_knows_what_it_is(path: Path, masks: dict, model: nn.Module) -> None:
    ticket = load_ticket(path)
    assert ticket.metadata == {"seed": 3}
    assert ticket.sparsity == sparsity_of(masks)
    statistics = {name for name in model.state_dict() if "running" in name or "num_batches" in name}
    assert ticket.base.keys() == model.state_dict().keys() - statistics
    assert ticket.statistics.keys() == statistics
    assert sum(ticket.nbytes.values()) < path.stat().st_size


def test_a_search_is_applied_to_its_base_alone(batches: list, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    base = state_copy(model)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches))
    pruner.compress(8, None)
    save_ticket(tmp_path / "wrapped", pruner, model)
    masks = pruner.get_masks()
    pruner.unwrap_model()
    save_ticket(tmp_path / "unwrapped", masks, model, {"config_list": pruner.config_list})
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "unwrapped").read_bytes()
    apply_masks(model, masks)

    fresh = ConvNet()
    fresh.load_state_dict(base)
    ticket = load_ticket(tmp_path / "wrapped")
    assert ticket.metadata["config_list"] == pruner.config_list
    ticket.apply(fresh)
    assert equal(state_copy(fresh), state_copy(model))
    assert not torch.equal(fresh.bn1.running_mean, base["bn1.running_mean"])
    images = batches[0][0]
    assert torch.equal(fresh.eval()(images), model.eval()(images))
    ticket.apply(base)  # a state dict as well
    assert equal(base, state_copy(model))


def test_tickets_start_another_search(path: Path, model: nn.Module, masks: dict) -> None:
    del masks["conv2"]["bias"], masks["conv1"]["bias"]
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    pruner.update_masks(load_ticket(path).masks | {"conv1": masks["conv1"]})
    assert same({m: {"weight": t["weight"]} for m, t in pruner.get_masks().items()}, masks)


def test_a_fresh_process_predicts_the_same(tmp_path: Path, path: Path, model: nn.Module) -> None:
    images = torch.randn(4, 1, 8, 8)
    torch.save(images, tmp_path / "images.pth")
    torch.save(model.state_dict(), tmp_path / "base.pth")
    load_ticket(path).apply(model)
    code = """
import torch
from conftest import ConvNet
from nni_jackpot import load_ticket
model = ConvNet()
model.load_state_dict(torch.load("base.pth"))
load_ticket("a.ticket").apply(model)
torch.save(model.eval()(torch.load("images.pth")).detach(), "logits.pth")
"""
    paths = [str(TESTS), str(HELPERS), str(HELPERS / "runs"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pth"), model.eval()(images))


def change_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nextafter(model.fc.weight[0, 0], torch.tensor(9.0))
    return model


def other_classifier(model: nn.Module) -> nn.Module:
    model.fc = nn.Linear(12, 5)
    return model


def wider(model: nn.Module) -> nn.Module:
    model.conv2 = nn.Conv2d(8, 13, 3)
    return model


def without_norm(model: nn.Module) -> nn.Module:
    model.bn1 = nn.Identity()
    return model


def with_more(model: nn.Module) -> nn.Module:
    model.more = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_weight, r"fc.weight \(here float32 \[3, 12\]\) differs$"),
        (other_classifier, "fc.weight .*differs; fc.bias .*differs"),
        (wider, r"conv2.weight is float32 \[13, 8, 3, 3\], its mask of shape \[12, 8, 3, 3\]"),
        (without_norm, "bn1.weight is missing.*and 2 more"),
        (with_more, "more.weight is unknown"),
        (lambda model: model.half(), "bn1.running_mean is float16"),
        (lambda model: model.double(), "bn1.running_mean is float64"),
    ],
)
def test_another_base_is_refused_and_left_alone(
    path: Path, model: nn.Module, change: Any, words: str
) -> None:
    other = change(model)
    before = state_copy(other)
    with pytest.raises(OtherBaseError, match=words):
        load_ticket(path).apply(other)
    assert equal(state_copy(other), before)


def test_another_type_is_refused_where_there_are_no_statistics(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    save_ticket(tmp_path / "a.ticket", {"": {"weight": torch.eye(8)}}, model)
    with pytest.raises(OtherBaseError, match=r"weight \(here bfloat16 \[8, 8\]\) differs"):
        load_ticket(tmp_path / "a.ticket").apply(model.bfloat16())


def test_statistics_of_the_base_do_not_matter(path: Path, model: nn.Module) -> None:
    expected = load_ticket(path).statistics
    model.bn1.running_mean.fill_(9.0)
    load_ticket(path).apply(model)
    assert torch.equal(model.bn1.running_mean, expected["bn1.running_mean"])


def test_a_wrapped_model_is_refused(path: Path, model: nn.Module) -> None:
    LotteryJackpotPruner(model, CONFIG_LIST)
    with pytest.raises(MaskError, match="still wrapped"):
        load_ticket(path).apply(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_and_layouts(tmp_path: Path, masks: dict, dtype: torch.dtype) -> None:
    model = ConvNet().to(dtype)
    save_ticket(tmp_path / "a.ticket", masks, model)
    model = model.to(memory_format=torch.channels_last)
    load_ticket(tmp_path / "a.ticket").apply(model)
    assert torch.equal(model.conv2.weight == 0, masks["conv2"]["weight"] == 0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int8])
def test_bases_with_tensors_of_rare_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(8, 8)
    model.register_buffer("rare", torch.arange(4).float().to(dtype))
    save_ticket(tmp_path / "a.ticket", {"": {"weight": torch.eye(8)}}, model)
    load_ticket(tmp_path / "a.ticket").apply(model)
    model.rare = torch.arange(1, 5).float().to(dtype)
    with pytest.raises(OtherBaseError, match=r"rare .* differs"):
        load_ticket(tmp_path / "a.ticket").check_base(model.state_dict())


def test_tied_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    save_ticket(tmp_path / "a.ticket", {"1": {"weight": torch.eye(6)}}, model)
    load_ticket(tmp_path / "a.ticket").apply(model)
    assert torch.equal(model[0].weight != 0, torch.eye(6).bool())


def test_masks_of_activations_are_kept_but_not_written(tmp_path: Path, model: nn.Module, masks: dict) -> None:
    masks["fc"] = {"_input_0": torch.ones(12), "_output_0": torch.tensor([1.0, 0.0, 1.0])}
    save_ticket(tmp_path / "a.ticket", masks, model)
    ticket = load_ticket(tmp_path / "a.ticket")
    assert torch.equal(ticket.masks["fc"]["_output_0"], masks["fc"]["_output_0"])
    before = state_copy(model)
    with pytest.raises(MaskError, match=r"prunes fc\._output_0, which is not a parameter"):
        ticket.apply(model)
    assert equal(state_copy(model), before)
    masks["fc"]["_output_0"].fill_(1)
    save_ticket(tmp_path / "b.ticket", masks, model)
    load_ticket(tmp_path / "b.ticket").apply(model)


@pytest.mark.parametrize(
    ("module", "mask", "words"),
    [
        ("conv3", torch.ones(2), "no parameter conv3.weight"),
        ("fc", torch.ones(3, 11), r"mask of fc.weight has shape \(3, 11\), expected \(3, 12\)"),
        ("fc", torch.full((3, 12), 0.5), "other than 0 and 1"),
    ],
)
def test_masks_that_do_not_fit(
    tmp_path: Path, model: nn.Module, module: str, mask: Tensor, words: str
) -> None:
    with pytest.raises(MaskError, match=words):
        save_ticket(tmp_path / "a.ticket", {module: {"weight": mask}}, model)
    assert not list(tmp_path.iterdir())


def test_a_ticket_comes_before_the_zeros(tmp_path: Path, model: nn.Module, masks: dict) -> None:
    apply_masks(model, masks)
    with pytest.raises(MaskError, match="zero already: save tickets before apply_masks"):
        save_ticket(tmp_path / "a.ticket", masks, model)


def test_metadata_are_plain_data(tmp_path: Path, model: nn.Module, masks: dict) -> None:
    for value in (torch.ones(1), float("nan"), {1, 2}):
        with pytest.raises(TicketError, match="metadata of a ticket must be what JSON can hold"):
            save_ticket(tmp_path / "a.ticket", masks, model, {"value": value})
    (tmp_path / "file").touch()
    with pytest.raises(OutputFolderError):
        save_ticket(tmp_path / "file" / "a.ticket", masks, model)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_90_percent_of_a_larger_network_within_a_hundredth_of_its_entropy(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 500))
    masks = {str(i): {"weight": torch.rand_like(model[i].weight) < 0.1} for i in range(2)}
    save_ticket(tmp_path / "a.ticket", masks, model)
    ticket = load_ticket(tmp_path / "a.ticket")
    bound = sum(encode(mask["weight"]).bound for mask in masks.values())
    assert bound == pytest.approx(0.469 * 1.5e6 / 8, rel=0.01)
    assert ticket.nbytes["masks"] < 1.01 * bound
    assert (tmp_path / "a.ticket").stat().st_size < ticket.nbytes["masks"] + 2000


@pytest.mark.parametrize(
    "edit",
    [
        lambda content, tensors: content.pop("masks"),
        lambda content, tensors: content.update(masks=[]),
        lambda content, tensors: content.update(base=content["base"][:-1]),
        lambda content, tensors: content.update(statistics={"x": ["float32"]}),
        lambda content, tensors: content.update(metadata=3),
        lambda content, tensors: content["masks"]["conv1"].update(weight={"shape": [8]}),
        lambda content, tensors: content["masks"]["conv1"]["weight"].update(ones=10**30),
        lambda content, tensors: content["masks"]["conv1"]["weight"].update(shape=[2**40]),
        lambda content, tensors: content["masks"].update(gone=content["masks"].pop("conv1")),
        lambda content, tensors: tensors.pop("mask.conv1.weight"),
        lambda content, tensors: tensors.pop("base"),
        lambda content, tensors: tensors.update(more=tensors["base"].clone()),
    ],
)
def test_what_is_sealed_but_no_ticket_is_refused(path: Path, edit: Any) -> None:
    content, tensors = read_sealed(path, KIND, 1)
    edit(content, tensors)
    write_sealed(path, KIND, 1, content, tensors)
    with pytest.raises(TicketError, match="is damaged"):
        load_ticket(path)


def test_claims_are_compared_with_the_model_before_memory_is_taken(path: Path, model: nn.Module) -> None:
    content, tensors = read_sealed(path, KIND, 1)
    content["masks"]["conv1"]["weight"] = {"dtype": "float32", "shape": [2**32], "ones": 0, "blocks": [2**32]}
    content["statistics"]["bn1.running_mean"] = ["float32", [2**60]]
    del tensors["mask.conv1.weight"]
    write_sealed(path, KIND, 1, content, tensors)
    with pytest.raises(OtherBaseError, match="its mask of shape"):
        load_ticket(path).apply(model)


def test_corrupted_tickets_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from fuzz_tickets import Fuzzer

    fuzzer = Fuzzer(tmp_path, seed=1)
    fuzzer.run(600)
    outcomes = {outcome for counts in fuzzer.outcomes.values() for outcome in counts}
    assert outcomes == {"refused", "equal", "another, whole"}
    assert set(fuzzer.outcomes["bits flipped"]) <= {"refused", "equal"}
    assert set(fuzzer.outcomes["cut short"]) == {"refused"}
    assert set(fuzzer.outcomes["forged: a weight as a statistic"]) == {"refused"}
    assert sum(name.startswith("forged: ") for name in fuzzer.outcomes) > 10
    assert not fuzzer.excess > 0  # not a number where memory is not known
