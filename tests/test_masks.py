from __future__ import annotations

import collections
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nni_jackpot import LotteryJackpotPruner, apply_masks, load_masks, mask_overlap, save_masks
from nni_jackpot.errors import CheckpointError, MaskError, OutputFolderError
from nni_jackpot.masks import densities, sparsity_of
from nni_jackpot.speedup import check_semi_structured, semi_structured, shrink, sparse_csr

A = {
    "conv": {"weight": torch.tensor([1.0, 1.0, 0.0, 0.0]), "bias": torch.ones(2)},
    "fc": {"weight": torch.eye(2)},
}
B = {
    "conv": {"weight": torch.tensor([1.0, 0.0, 1.0, 0.0]), "bias": torch.ones(2)},
    "fc": {"weight": torch.eye(2)},
}


def test_overlap_is_eq_7_per_target_and_in_total() -> None:
    overlap = mask_overlap(A, B)
    assert overlap.per_target == {"conv.weight": 0.5, "fc.weight": 1.0}
    assert overlap.total == 6 / 8
    assert mask_overlap(A, A).total == 1.0


def test_overlap_refuses_masks_of_different_targets() -> None:
    with pytest.raises(MaskError, match=r"fc\.weight"):
        mask_overlap(A, {"conv": B["conv"]})
    with pytest.raises(MaskError, match=r"conv\.weight .*\(4,\) and \(3,\)"):
        mask_overlap(A, {**B, "conv": {"weight": torch.ones(3), "bias": torch.ones(2)}})


def test_densities() -> None:
    assert densities(A) == {"conv.weight": 0.5, "conv.bias": 1.0, "fc.weight": 0.5}


def test_sparsity_counts_pruned_targets_only() -> None:
    assert sparsity_of(A) == 0.5
    assert sparsity_of({"conv": {"bias": torch.ones(2), "weight": None}}) == 0.0


def test_save_and_load(tmp_path: Path) -> None:
    masks = {"conv": {"weight": torch.eye(3), "bias": None}}
    save_masks(masks, tmp_path / "deep" / "masks.pth")
    loaded = load_masks(tmp_path / "deep" / "masks.pth")
    assert torch.equal(loaded["conv"]["weight"], torch.eye(3))
    assert loaded["conv"]["bias"] is None
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["masks.pth"]


def test_masks_saved_by_nni_users_load(tmp_path: Path) -> None:
    masks = collections.defaultdict(dict)
    masks["conv"]["weight"] = torch.eye(3)
    torch.save(masks, tmp_path / "masks.pth")
    assert torch.equal(load_masks(tmp_path / "masks.pth")["conv"]["weight"], torch.eye(3))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no mask file"):
        load_masks(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pth")
    for name in ("text", "empty", "weights"):
        with pytest.raises(CheckpointError, match=name):
            load_masks(tmp_path / f"{name}.pth")


def test_no_code_of_a_mask_file_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv": {"weight": Evil()}}))
    torch.save({"conv": {"weight": Evil()}}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(CheckpointError):
            load_masks(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match=r"cannot write .*masks\.pth"):
        save_masks(A, tmp_path / "file" / "masks.pth")


def test_apply_masks_writes_zeros_and_leaves_the_rest(model: nn.Module) -> None:
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    masks = pruner.get_masks()
    with pytest.raises(MaskError, match="unwrap_model"):
        apply_masks(model, masks)
    pruner.unwrap_model()
    assert apply_masks(model, masks) is model
    for name, value in model.state_dict().items():
        module, _, target = name.rpartition(".")
        mask = masks.get(module, {}).get(target)
        assert torch.equal(value, dense[name] if mask is None else dense[name] * mask)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_apply_masks_changes_nothing_when_one_mask_does_not_fit(model: nn.Module) -> None:
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    good = {"weight": torch.zeros_like(model.conv1.weight)}
    with pytest.raises(MaskError, match=r"no parameter nowhere\.weight"):
        apply_masks(model, {"conv1": good, "nowhere": {"weight": torch.ones(1)}})
    with pytest.raises(MaskError, match=r"conv2\.weight has shape \(1,\)"):
        apply_masks(model, {"conv1": good, "conv2": {"weight": torch.ones(1)}})
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


# --- masks of another form


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


EYE = torch.eye(4)
TAKERS: dict[str, Callable[[Any], Any]] = {
    "apply_masks": lambda masks: apply_masks(two(), masks),
    "mask_overlap": lambda masks: mask_overlap(masks, masks),
    "the other of mask_overlap": lambda masks: mask_overlap({}, masks),
    "densities": densities,
    "sparsity_of": sparsity_of,
    "save_masks": lambda masks: save_masks(masks, "/nowhere/masks.pth"),
    "sparse_csr": lambda masks: sparse_csr(two(), masks),
    "check_semi_structured": lambda masks: check_semi_structured(two(), masks),
    "semi_structured": lambda masks: semi_structured(two(), masks),
    "shrink": lambda masks: shrink(two(), masks, torch.ones(1, 4)),
}
NO_MASKS: list[tuple[Any, str]] = [
    ({"0.weight": EYE}, r'write \{"0": \{"weight": mask\}\} for "0\.weight"'),
    ({"a.b.weight": EYE}, r'write \{"a\.b": \{"weight": mask\}\} for "a\.b\.weight"'),
    ({"0": EYE}, r'write \{"0": \{"weight": mask\}\} for "0"'),
    ({"bias": EYE}, r'write \{"": \{"bias": mask\}\} for "bias"'),
    ({"0": {"weight": EYE}, "1.weight": EYE}, r'for "1\.weight"'),
    ({"0": None}, "the entry '0' is a NoneType"),
    ([EYE], "not a list"),
    ((two(), {"0": {"weight": EYE}}), "not a tuple"),
    (None, "not a NoneType"),
    ({"0": {"weight": EYE.tolist()}}, r"the mask of 0\.weight is a list, not a tensor"),
    ({"0": {"weight": {"x": EYE}}}, r"the mask of 0\.weight is a dict, not a tensor"),
    ({"0": {"weight": EYE.to_sparse()}}, r"the mask of 0\.weight is of layout torch\.sparse_coo"),
    ({"0": {"weight": EYE.to("meta")}}, r"the mask of 0\.weight is on the meta device"),
    *(
        ({"0": {"weight": EYE * value}}, r"the mask of 0\.weight holds values other than 0 and 1")
        for value in (0.5, 2, -1, float("nan"), float("inf"))
    ),
]


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_what_is_no_masks_is_told_by_all_that_take_them(take: Callable[[Any], Any]) -> None:
    for masks, message in NO_MASKS:
        with pytest.raises(MaskError, match=message):
            take(masks)


def test_what_is_no_masks_is_told_of_a_file(tmp_path: Path) -> None:
    torch.save({"0.weight": EYE}, tmp_path / "flat.pth")
    torch.save({"0": {"weight": EYE / 2}}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r'flat\.pth holds no masks: .*\{"0": \{"weight": mask\}\}'):
        load_masks(tmp_path / "flat.pth")
    with pytest.raises(CheckpointError, match=r"half\.pth holds no masks: .*other than 0 and 1"):
        load_masks(tmp_path / "half.pth")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_masks_are_of_any_type_that_holds_zero_and_one(dtype: torch.dtype) -> None:
    model, masks = two(), {"0": {"weight": EYE.to(dtype)}}
    apply_masks(model, masks)
    assert torch.equal(model[0].weight != 0, EYE.bool())
    assert densities(masks) == {"0.weight": 0.25}
    assert sparsity_of(masks) == 0.75
    assert mask_overlap(masks, {"0": {"weight": EYE}}).total == 1.0


# --- masks of a model in a wrapper


class Inner(nn.Module):
    """Holds a part that is wrapped by itself."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.body = wrap(two())


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
    "the other way round": lambda model: nn.DataParallel(torch.compile(model)),
}


def masks_of(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"weight": EYE} for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_masks_fit_with_and_without_a_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    pairs = (two(), wrap(two())), (Inner(lambda model: model), Inner(wrap))
    for plain, wrapped in pairs:
        for model, other in [(plain, wrapped), (wrapped, plain), (wrapped, wrapped)]:
            before = masks_of(other)
            apply_masks(model, before)
            weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
            assert all(torch.equal(weight != 0, EYE.bool()) for weight in weights)
            overlap = mask_overlap(masks_of(model), before)
            assert overlap.total == 1.0
            assert overlap.per_target.keys() == densities(masks_of(model)).keys()
        x = torch.randn(2, 4)
        if isinstance(plain, nn.Sequential):
            torch.testing.assert_close(sparse_csr(plain, masks_of(wrapped), x)(x), plain(x))


def test_a_name_that_does_not_fit_apart_from_its_wrapper_is_told() -> None:
    model = two()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MaskError, match=r"no parameter module\.7\.weight, nor exactly one that is 7\.weight"):
        apply_masks(model, {"module.0": {"weight": EYE}, "module.7": {"weight": EYE}})
    ambiguous = nn.ModuleDict({"module": two(), "_orig_mod": two()})
    with pytest.raises(MaskError, match=r"no parameter 0\.weight"):
        apply_masks(ambiguous, {"0": {"weight": EYE}})
    apply_masks(ambiguous, {"module.0": {"weight": EYE}})
    assert not torch.equal(ambiguous["_orig_mod"][0].weight != 0, EYE.bool())
    with pytest.raises(MaskError, match="different targets"):
        mask_overlap({"0": {"weight": EYE}}, {"0": {"weight": EYE}, "module.0": {"weight": EYE}})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- parameters that cannot be masked


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.words.weight


def test_tied_weights_are_one_parameter() -> None:
    for names in (["words"], ["head"], ["words", "head"]):
        model = apply_masks(Tied(), {name: {"weight": EYE.clone()} for name in names})
        assert model.head.weight is model.words.weight
        assert torch.equal(model.words.weight != 0, EYE.bool())
    model = Tied()
    before = model.words.weight.clone()
    with pytest.raises(
        MaskError, match=r"words\.weight and head\.weight are one parameter, and their masks differ"
    ):
        apply_masks(model, {"words": {"weight": EYE}, "head": {"weight": 1 - EYE}})
    with pytest.raises(MaskError, match="are one parameter"):
        apply_masks(two(), {"0": {"weight": EYE}, "module.0": {"weight": 1 - EYE}})
    assert torch.equal(model.words.weight, before)


def of_inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


def computed() -> nn.Module:
    layer = nn.Linear(4, 4)
    weight = layer.weight * 2
    layer._parameters["weight"] = weight
    return layer


BAD_LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "inference": (of_inference, r"zeros cannot be written into 1\.weight, of torch\.float32: .*[Ii]nference"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), r"1\.weight has no values yet"),
    "lazy": (lambda: nn.LazyLinear(4), r"1\.weight has no values yet"),
    "computed": (computed, r"1\.weight is computed from other tensors"),
}


@pytest.mark.parametrize("kind", BAD_LAYERS)
def test_a_parameter_that_cannot_be_masked_leaves_all_as_they_were(kind: str) -> None:
    make, message = BAD_LAYERS[kind]
    model = nn.Sequential(nn.Linear(4, 4), make())
    before = model[0].weight.clone()
    with pytest.raises(MaskError, match=message):
        apply_masks(model, {"0": {"weight": EYE}, "1": {"weight": EYE}})
    assert torch.equal(model[0].weight, before)
