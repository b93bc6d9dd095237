"""The one law: a wrapped model computes what a fresh copy computes with the exported masks applied.

`check_law` checks it for a model that is searched, with all that unwrapping gives back; `check_refusal` checks
that a model that cannot be searched is refused before anything about it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from nni.compression.base.setting import PruningSetting
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from nni_jackpot import JackpotError, LotteryJackpotPruner, apply_masks
from nni_jackpot.masks import Masks
from nni_jackpot.nni_bridge.selected import know_layers

MakeModel = Callable[[], nn.Module]
ConfigList = Sequence[Mapping[str, Any]]
Inputs = tuple[Any, ...] | Mapping[str, Any]
"""Arguments of a model, positional or by name."""

# Tolerance in roundings of a tensor's largest number, for kernels that sum some hundred products per row in
# another order, over several layers. PyTorch picks kernels by the parameters that need gradients, so that
# gradients have the same tolerance.
OTHER_KERNEL = 32


class Searched(NamedTuple):
    """Number of searched parameters, and of their weights."""

    parameters: int
    weights: int


def check_law(
    make_model: MakeModel,
    config_list: ConfigList,
    example_inputs: Inputs,
    steps: int = 2,
    exact: bool = True,
    **pruner_options: Any,
) -> Searched:
    """Search a model for a few steps in a plain loop, and check the law.

    Parameters
    ----------
    make_model
        Makes the model, the same at every call.
    config_list
        Entries that select by ``op_types`` and ``exclude_op_names``, all at one ``sparse_ratio``.
    exact
        Whether model and copy run the same kernels on the same numbers, so that outputs are equal bit for bit.
        False if PyTorch runs a fused kernel for layers without hooks.
    """
    model, plain, start = (_make(make_model) for _ in range(3))
    expected = _selected(plain, config_list)
    dense = _values(plain.named_parameters(remove_duplicate=False))
    before, flags = _objects(model), [p.requires_grad for p in model.parameters()]

    with torch.no_grad():
        output_before = _eval(model, example_inputs)
    pruner = LotteryJackpotPruner(model, config_list, **pruner_options)
    start_masks = pruner.get_masks()
    scores = pruner.score_parameters()
    # The first step of Adam has the size of its rate, whatever the scale of the loss: weights do change sides.
    optimizer = torch.optim.Adam(scores, lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        _train(model, example_inputs, seed=step)
        assert all(score.grad is not None for score in scores), "a score has no gradient"
        if step == 0:
            gradients = [score.grad.clone() for score in scores if score.grad is not None]
        optimizer.step()
    with torch.no_grad():
        output = _eval(model, example_inputs)
        masks = pruner.get_masks()
        read = _read(model, masks)
    assert _same(output, _eval(model, example_inputs), OTHER_KERNEL), "gradients make a difference"
    assert not _same(start_masks, masks), "no weight has changed sides"
    pruner.unwrap_model()

    _check_as_it_was(model, plain, before, flags, dense, example_inputs)
    copy = _make(make_model)
    _take_buffers(copy, model)
    with torch.no_grad():
        assert _same(_eval(model, example_inputs), _eval(copy, example_inputs)), "unwrapped"
        # PyTorch picks kernels by it, without gradients too, and weights of a wrapped model are frozen.
        apply_masks(copy, masks).requires_grad_(False)
        masked_output = _eval(copy, example_inputs)
        assert _same(output, masked_output, 0 if exact else OTHER_KERNEL), "what is searched is not what runs"
        assert not _same(output_before, masked_output), "the masks make no difference"
        _check_zeros(copy, masks, dense, expected, config_list[0]["sparse_ratio"])
        assert _same(read, _read(copy, masks)), "what a module says its weights are"

    if not any(map(parametrize.is_parametrized, start.modules())):  # whose weights may be others in training
        _check_gradients(apply_masks(start, start_masks), start_masks, dense, gradients, example_inputs)
    sizes = [getattr(plain.get_submodule(m), t).numel() for m, t in expected.values()]
    return Searched(len(sizes), sum(sizes))


def check_refusal(
    make_model: MakeModel,
    config_list: ConfigList,
    example_inputs: Inputs | None = None,
    match: str | None = None,
    **pruner_options: Any,
) -> str:
    """Check that a model is refused and unchanged; return the message.

    Parameters
    ----------
    example_inputs
        What the model computes is compared on these; None where it computes nothing yet.
    """
    model = _make(make_model)
    state = _values([*model.named_parameters(), *model.named_buffers()])
    if example_inputs is not None:
        with torch.no_grad():
            output = _eval(model, example_inputs)
    before = _everything(model)
    with pytest.raises(JackpotError, match=match) as refusal:
        LotteryJackpotPruner(model, config_list, **pruner_options)
    assert _everything(model) == before
    if example_inputs is not None:
        with torch.no_grad():
            assert _same(output, _eval(model, example_inputs)), "the refused model"
        after = _values([*model.named_parameters(), *model.named_buffers()])
        assert _same(state, after), "the refused model's state"
    return str(refusal.value)


def check_either(make_model: MakeModel, config_list: ConfigList, example_inputs: Inputs) -> Searched | str:
    """Check that a model is either searched by the law or refused; return what was searched, or the message."""
    try:
        LotteryJackpotPruner(_make(make_model), config_list)
    except JackpotError:
        return check_refusal(make_model, config_list, example_inputs)
    return check_law(make_model, config_list, example_inputs)


# -- running


def _make(make_model: MakeModel) -> nn.Module:
    torch.manual_seed(0)
    return make_model()


def _call(model: nn.Module, inputs: Inputs, seed: int) -> Any:
    torch.manual_seed(seed)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _eval(model: nn.Module, inputs: Inputs) -> Any:
    return _call(model.eval(), inputs, seed=0)


def _train(model: nn.Module, inputs: Inputs, seed: int) -> None:
    """Run backward from the squared distance of all float outputs to random targets.

    The squares alone would be the same whatever the weights where outputs are normalised.
    """
    output = _call(model.train(), inputs, seed)
    floats = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack([(leaf - torch.randn_like(leaf)).square().sum().double() for leaf in floats]).sum().backward()


# -- comparing


def _same(a: Any, b: Any, roundings: int = 0) -> bool:
    """Return True if two trees of outputs are equal up to a number of roundings of each tensor's largest number."""
    leaves = tree_leaves(a), tree_leaves(b)
    return len(leaves[0]) == len(leaves[1]) and all(
        _same_leaf(*pair, roundings) for pair in zip(*leaves, strict=True)
    )


def _same_leaf(a: Any, b: Any, roundings: int) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a == b
    a, b = a.detach(), b.detach()
    assert not a.isnan().any(), "NaN is equal to nothing"
    if not roundings or a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = roundings * torch.finfo(a.dtype).eps * float(b.abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def _values(named: Any) -> dict[str, Tensor | None]:
    """Return clones by name; None for tensors without a value."""
    return {
        name: None if tensor.is_meta or nn.parameter.is_lazy(tensor) else tensor.detach().clone()
        for name, tensor in named
    }


def _objects(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return the objects of a model by all their names, in order."""
    parameters = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    modules = [(name, id(m), type(m)) for name, m in model.named_modules(remove_duplicate=False)]
    return [*parameters, *modules]


def _attributes(model: nn.Module) -> set[tuple[str, str, Any]]:
    """Return every module's attributes by type, and dicts, such as hooks, by length."""
    return {
        (name, key, len(value) if isinstance(value, dict) else type(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def _everything(model: nn.Module) -> tuple[Any, ...]:
    """Return everything that identifies the state of a model, except the values."""
    buffers = [(name, id(buffer)) for name, buffer in model.named_buffers()]
    return _objects(model), buffers, _attributes(model), [p.requires_grad for p in model.parameters()]


def _check_as_it_was(
    model: nn.Module,
    plain: nn.Module,
    before: list[tuple[Any, ...]],
    flags: list[bool],
    dense: dict[str, Tensor | None],
    inputs: Inputs,
) -> None:
    """Check that an unwrapped model equals the original, except for changes that a plain copy makes when it runs."""
    assert _objects(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert _same(_values(model.named_parameters(remove_duplicate=False)), dense)
    came = _values(plain.named_buffers())
    with torch.no_grad():
        _call(plain.train(), inputs, seed=0)
        _eval(plain, inputs)
    assert not (changed := _attributes(model) ^ _attributes(plain)), f"attributes {changed}"
    left, ran = _values(model.named_buffers()), _values(plain.named_buffers())
    assert list(left) == list(ran)
    for name in came.keys() & ran.keys():
        if _same(came[name], ran[name]):
            assert _same(left[name], came[name]), f"buffer {name}"


def _take_buffers(copy: nn.Module, model: nn.Module) -> None:
    """Copy the norm statistics, and everything else that training changes, from a searched model."""
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in copy.named_buffers():
            buffer.copy_(buffers[name])


# -- targets


def _named(masks: Masks) -> list[tuple[str, str, str]]:
    """Return the names of masks: parameter, module and target."""
    return [
        (f"{module}.{target}".lstrip("."), module, target)
        for module, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None and not mask.all()
    ]


def _read(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return the value that code reading a module's weight gets."""
    return {name: getattr(model.get_submodule(m), target).clone() for name, m, target in _named(masks)}


def _identity(module: nn.Module, target: str) -> Any:
    """Return the identity of a weight: the parameter, or the module that computes it."""
    return id(module._parameters[target]) if target in module._parameters else (id(module), target)


def _selected(model: nn.Module, config_list: ConfigList) -> dict[Any, tuple[str, str]]:
    """Return all weights that the config list selects, each once, by its first name."""
    found: dict[Any, tuple[str, str]] = {}
    know_layers(model)
    for name, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module).__name__
        if not any(_selects(entry, name, kind) for entry in config_list):
            continue
        for target, setting in PruningSetting.registry[kind].items():
            if "sparse_ratio" in setting:
                found.setdefault(_identity(module, target), (name, target))
    return found


def _selects(entry: Mapping[str, Any], name: str, kind: str) -> bool:
    return kind in entry["op_types"] and name not in entry.get("exclude_op_names", ())


def _check_zeros(
    copy: nn.Module,
    masks: Masks,
    dense: dict[str, Tensor | None],
    expected: dict[Any, tuple[str, str]],
    ratio: float,
) -> None:
    """Check that exactly the selected weights have their number of zeros, at the zeros of their masks."""
    found: dict[Any, Tensor] = {}
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    for name, module_name, target in _named(masks):
        module, mask = copy.get_submodule(module_name), masks[module_name][target]
        assert mask is not None
        assert int((mask == 0).sum()) == int(ratio * mask.numel()), f"zeros of {name}"
        assert torch.equal(found.setdefault(_identity(module, target), mask), mask), f"tied {name}"
        assert not getattr(module, target)[mask == 0].any(), f"{name} is kept where its mask is 0"
        if (weight := dense.get(name)) is not None:
            assert torch.equal(parameters[name], weight.masked_fill(mask == 0, 0)), name
    assert len(found) == len(expected), f"asked for {sorted(expected.values())}, found {sorted(masks)}"


def _check_gradients(
    start: nn.Module,
    masks: Masks,
    dense: dict[str, Tensor | None],
    gradients: list[Tensor],
    inputs: Inputs,
) -> None:
    """Check the gradients of scores, in model order: a masked copy's weight gradients times the weights."""
    parameters = dict(start.requires_grad_(True).named_parameters(remove_duplicate=False))
    _train(start, inputs, seed=0)
    weights = {id(parameters[name]): name for name, *_ in _named(masks)}
    for name, gradient in zip(weights.values(), gradients, strict=True):
        weight, of_weight = dense[name], parameters[name].grad
        assert weight is not None
        assert of_weight is not None, f"the model does not use {name}"
        assert _same(gradient.to(weight.dtype), of_weight * weight, OTHER_KERNEL), (
            f"gradient of the scores of {name}"
        )
