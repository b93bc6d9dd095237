"""Search block by block on tiny networks of random weights: a Llama, a BERT, a GPT-2 and vision transformers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

from nni_jackpot import apply_masks
from nni_jackpot.errors import BlocksError, CheckpointError, MaskError, NothingKeptError, SparseRatioError
from nni_jackpot.masking.granularity import Grains
from nni_jackpot.runtime.settings import SettingError
from nni_jackpot.search.blockwise import BlockReport, BlockSearch, Target, blocks_of, search_blocks
from nni_jackpot.search.blockwise.blocks import capture
from nni_jackpot.search.blockwise.polish import Polish, polish

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
QUICK = BlockSearch(steps=6, lr=0.01, checks=3)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=67, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def vit() -> nn.Module:
    return VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=5)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**options)


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(4):
        mask = torch.ones(3, 8, dtype=torch.long)
        mask[1, 5:] = 0
        tokens = torch.randint(3, 67, (3, 8), generator=generator)
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches


def images() -> list[Tensor]:
    return list(torch.randn(4, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "llama": (llama, texts, "model.layers"),
    "bert": (bert, texts, "encoder.layer"),
    "gpt2": (gpt2, texts, "transformer.h"),
    "vit": (vit, images, "encoder.layers"),
    "timm": (timm_vit, images, "blocks"),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, str]:
    torch.manual_seed(0)
    make, batches, blocks = NETWORKS[request.param]
    model = make()
    with torch.no_grad():  # weights so large that a block changes its input
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model, batches(), blocks


def flat(masks: Mapping[str, Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
    return {f"{m}.{t}": mask for m, ts in masks.items() for t, mask in ts.items() if mask is not None}


def test_blocks_are_found(network: tuple[nn.Module, Any, str]) -> None:
    model, _, blocks = network
    names = blocks_of(model)
    assert len(names) == 2
    assert all(name.startswith(f"{blocks}.") for name in names)


def test_a_search_gives_masks_and_leaves_the_network_alone(network: tuple[nn.Module, Any, str]) -> None:
    model, batches, blocks = network
    model.train()
    before = copy.deepcopy(model.state_dict())
    needs_gradient = [p.requires_grad for p in model.parameters()]
    reports: list[BlockReport] = []
    masks = flat(
        search_blocks(
            model, batches, sparse_pattern="2:4", settings=QUICK, on_block=lambda r, s: reports.append(r)
        )
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needs_gradient
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert masks
    assert all(name.startswith(blocks) for name in masks)
    for name, mask in masks.items():
        # The inputs of a weight run along its second dimension, and along the first of GPT-2's Conv1D.
        rows = mask.t() if isinstance(model, transformers.GPT2LMHeadModel) else mask
        assert (rows.reshape(-1, 4).sum(1) == 2).all(), name
    assert [(r.index, r.total) for r in reports] == [(1, 2), (2, 2)]
    assert all(r.loss <= r.start_loss for r in reports)


@pytest.mark.parametrize("start", ["swaps", "wanda", "magnitude"])
@pytest.mark.parametrize("lr", [0.001, 1.0])
def test_a_block_never_ends_worse_than_it_began(start: str, lr: float) -> None:
    torch.manual_seed(0)
    model, reports = bert(), []
    settings = BlockSearch(start=start, steps=8, lr=lr)
    search_blocks(
        model, texts(), sparse_ratio=0.7, settings=settings, on_block=lambda r, s: reports.append(r)
    )
    assert len(reports) == 2
    assert all(math.isfinite(r.loss) and r.loss <= r.start_loss for r in reports)


def test_the_reported_loss_is_that_of_the_masked_network() -> None:
    """The last block's output under all masks, against the dense one, on the held-out batch."""
    torch.manual_seed(0)
    model, batches, reports = bert().eval(), texts(), []
    masks = search_blocks(
        model, batches, sparse_pattern="2:4", settings=QUICK, on_block=lambda r, s: reports.append(r)
    )
    with torch.no_grad():
        dense, sparse = (
            m(**batches[-1]).last_hidden_state[batches[-1]["attention_mask"].bool()]
            for m in (model, apply_masks(copy.deepcopy(model), masks).eval())
        )
    expected = ((sparse - dense).square().sum() / dense.square().sum()).item()
    assert reports[-1].loss == pytest.approx(expected, rel=1e-4)


def test_the_search_lowers_the_error(network: tuple[nn.Module, Any, str]) -> None:
    model, batches, _ = network
    reports: list[BlockReport] = []
    settings = BlockSearch(start="magnitude", steps=40, lr=0.003, checks=8)
    search_blocks(  # a single batch is trained on and compared on
        model, batches[:1], sparse_ratio=0.5, settings=settings, on_block=lambda r, s: reports.append(r)
    )
    assert reports[0].loss < reports[0].start_loss


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_every_row_keeps_the_same_number(ratio: float) -> None:
    for make in (llama, gpt2):
        torch.manual_seed(0)
        masks = flat(search_blocks(make(), texts(), sparse_ratio=ratio, settings=QUICK))
        for mask in masks.values():
            rows = mask.t() if make is gpt2 else mask
            assert (rows.sum(1) == rows.shape[1] - round(rows.shape[1] * ratio)).all()


def test_targets_of_ones_own() -> None:
    torch.manual_seed(0)
    model, weight = bert(), "encoder.layer.1.output.dense.weight"
    targets = {weight: Target(Grains((16, 32)), keep=37)}
    masks = search_blocks(model, texts(), targets, settings=QUICK)
    assert list(flat(masks)) == [weight]
    assert flat(masks)[weight].sum() == 37


def test_the_same_seed_gives_the_same_masks() -> None:
    torch.manual_seed(0)
    model, batches = llama(), texts()
    found = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(global_seed)
        settings = BlockSearch(steps=6, lr=0.02, checks=1, seed=seed)
        found.append(flat(search_blocks(model, batches, sparse_pattern="2:4", settings=settings)))
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())
    assert torch.initial_seed() == 2


def test_a_resumed_search_ends_as_the_whole_one(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, batches, file = llama(), texts(), tmp_path / "state.pt"
    states: list[Mapping[str, Any]] = []
    options: dict[str, Any] = {"sparse_pattern": "2:4", "settings": QUICK}
    whole = search_blocks(model, batches, **options, on_block=lambda r, s: states.append(s))
    torch.save(states[0], file)
    state = torch.load(file, weights_only=True)
    reports: list[BlockReport] = []
    resumed = search_blocks(model, batches, **options, state=state, on_block=lambda r, s: reports.append(r))
    assert [report.index for report in reports] == [2]
    assert all(torch.equal(mask, flat(resumed)[name]) for name, mask in flat(whole).items())
    with pytest.raises(CheckpointError, match="settings"):
        search_blocks(model, batches, sparse_pattern="2:4", settings=BlockSearch(), state=state)
    with pytest.raises(CheckpointError, match="targets"):
        search_blocks(model, batches, sparse_ratio=0.5, settings=QUICK, state=state)


def test_a_search_is_resumed_with_the_same_weights_and_batches_alone() -> None:
    torch.manual_seed(0)
    model, batches = llama(), texts()
    states: list[Mapping[str, Any]] = []
    options: dict[str, Any] = {"sparse_pattern": "2:4", "settings": QUICK}
    search_blocks(model, batches, **options, on_block=lambda r, s: states.append(s))
    search_blocks(model, copy.deepcopy(batches), **options, state=states[0])
    joined = [
        {name: torch.cat([a[name], b[name]]) for name in a}
        for a, b in zip(batches[::2], batches[1::2], strict=True)
    ]
    others = {"order": batches[::-1], "fewer": batches[:3], "sizes": joined}
    for other in others.values():
        with pytest.raises(CheckpointError, match="batches are others, or in another order"):
            search_blocks(model, other, **options, state=states[0])
    wrong = {name: mask.clone().fill_(True) for name, mask in states[0]["kept"].items()}
    with pytest.raises(CheckpointError, match="does not keep"):
        search_blocks(model, batches, **options, state={**states[0], "kept": wrong})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(CheckpointError, match="weights are others"):
        search_blocks(model, batches, **options, state=states[0])


@pytest.mark.parametrize("aim", ["dense", "own"])
def test_tokens_that_do_not_count_decide_nothing(aim: str) -> None:
    torch.manual_seed(0)
    model = bert()
    found = []
    for filler in (0, 5):
        batches = texts()
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = filler
        found.append(
            flat(
                search_blocks(
                    model,
                    batches,
                    sparse_pattern="2:4",
                    settings=BlockSearch(steps=4, aim=aim, skip_tokens=1),
                )
            )
        )
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_blocks_of_a_convolutional_network_are_named() -> None:
    torch.manual_seed(0)
    model = resnet18(num_classes=5)
    with pytest.raises(BlocksError, match=r"layer1, layer2, layer3, layer4 hold blocks of the same type"):
        blocks_of(model)
    names = [f"layer{stage}.{i}" for stage in (1, 2) for i in (0, 1)]
    batches = [torch.randn(2, 3, 16, 16) for _ in range(2)]
    masks = flat(search_blocks(model, batches, sparse_pattern="2:4", blocks=names, settings=QUICK))
    assert "layer2.0.downsample.0.weight" in masks
    assert all((mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all() for mask in masks.values())


def test_what_is_no_chain_of_blocks_is_refused() -> None:
    torch.manual_seed(0)
    model, batches = bert(), texts()
    first, second = blocks_of(model)
    for blocks, message in [
        ([second, first], "in the order"),
        ([f"{first}.attention", second], "is not the output of"),
    ]:
        with pytest.raises(BlocksError, match=message):
            capture(model.eval(), blocks, batches)
    with pytest.raises(BlocksError, match="one batch"):
        capture(model, [first], [])
    with pytest.raises(BlocksError, match="no list of blocks"):
        blocks_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_searched_is_refused() -> None:
    model = bert()
    for options, error in [
        ({}, SparseRatioError),
        ({"sparse_ratio": 1.0}, SparseRatioError),
        ({"sparse_ratio": 0.99}, NothingKeptError),
        ({"sparse_ratio": 0.5, "sparse_pattern": "2:4"}, SparseRatioError),
    ]:
        with pytest.raises(error):
            search_blocks(model, texts(), **options)
    targets = {"encoder.layer.0.output.dense.weight": Target(Grains((16, 32)), 9)}
    with pytest.raises(SparseRatioError, match="not both"):
        search_blocks(model, texts(), targets, sparse_ratio=0.5)
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight
    with pytest.raises(BlocksError, match="is the same weight as"):
        search_blocks(model, texts(), targets)
    for settings in ({"start": "best"}, {"aim": "loss"}, {"steps": -1}, {"lr": 0.0}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BlockSearch(**settings)
    for kind in (BlockSearch, Polish):
        with pytest.raises(SettingError, match=r"momentum: found 1\.0"):
            kind(momentum=1.0)


def test_a_polish_never_ends_worse_than_it_began() -> None:
    torch.manual_seed(0)
    model, batches = bert(), texts()
    before = copy.deepcopy(model.state_dict())
    masks = search_blocks(model, batches, sparse_pattern="2:4", settings=BlockSearch(steps=0))

    def loss(output: Any, dense: Any, batch: Any) -> Tensor:
        return (output.last_hidden_state - dense.last_hidden_state).square().mean()

    for lr in (0.003, 1.0):
        losses: list[float] = []
        found = polish(
            model,
            batches,
            masks,
            loss,
            sparse_pattern="2:4",
            settings=Polish(steps=20, lr=lr, checks=4),
            on_check=lambda step, value, losses=losses: losses.append(value),
        )
        with torch.no_grad():
            end = loss(
                apply_masks(copy.deepcopy(model), found).eval()(**batches[-1]),
                model.eval()(**batches[-1]),
                None,
            ).item()
        assert end == pytest.approx(min(losses), rel=1e-4)
        assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in flat(found).values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [bert, llama])
def test_a_polish_finds_the_same_masks_with_and_without_a_cache(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, batches = make(), texts()
    masks = search_blocks(model, batches, sparse_pattern="2:4", settings=BlockSearch(steps=0))
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def loss(output: Any, dense: Any, batch: Any) -> Tensor:
        return (output[0] - dense[0]).square().mean()

    found, calls = [], []
    for gib in (0.0, 1.0):
        forwards.clear()
        settings = Polish(steps=12, lr=0.01, checks=2, cache_gib=gib)
        found.append(flat(polish(model, batches, masks, loss, sparse_pattern="2:4", settings=settings)))
        calls.append(len(forwards))
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())
    assert calls == [
        2 * (12 + 3),
        12 + 3 + len(batches),
    ]  # steps and checks: sparse and dense, or sparse alone


def test_masks_that_do_not_fit_the_targets_are_refused() -> None:
    torch.manual_seed(0)
    model, batches = bert(), texts()
    masks = search_blocks(model, batches, sparse_ratio=0.75, settings=BlockSearch(steps=0, start="magnitude"))

    def loss(output: Any, dense: Any, batch: Any) -> Tensor:
        return (output.last_hidden_state - dense.last_hidden_state).square().mean()

    with pytest.raises(MaskError, match="keeps 64 grains, which is not 128"):
        polish(model, batches, masks, loss, sparse_ratio=0.5)
    with pytest.raises(MaskError, match="has no mask of its shape"):
        polish(model, batches, {}, loss, sparse_ratio=0.5)
