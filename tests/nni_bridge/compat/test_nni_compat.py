"""NNI's pruning and speedup on the installed PyTorch and Python, with and without each patch."""

from __future__ import annotations

import dis
import itertools
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HELPERS
from nni.common.concrete_trace_utils import concrete_proxy, concrete_tracer, operator_patcher
from nni.compression.speedup import ModelSpeedup, dependency, mask_conflict
from nni.compression.speedup import utils as speedup_utils
from nni.compression.speedup.container import NodeInfo
from nni.compression.speedup.mask_updater import NoChangeMaskUpdater
from nni.compression.speedup.replacement import replace_module
from nni.compression.utils import Evaluator, TransformersEvaluator
from torch import nn
from torch.nn import functional as F

import nni_jackpot  # noqa: F401
from nni_jackpot.nni_bridge import compat as nni_compat

CURRENT_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
NEW_BYTECODE = sys.version_info >= (3, 11)
NEW_JUMPS = NEW_BYTECODE and sys.version_info[:2] != (3, 12)  # 3.12 has the old names again
NEW_WRAPS = sys.version_info >= (3, 12)
LIGHTNING = find_spec("pytorch_lightning") is not None
TRANSFORMERS = find_spec("transformers") is not None and find_spec("accelerate") is not None


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str | None]], list[str]]:
    """Return each check's failure before and after its patch, and the checks that fail with all patches."""
    folder = tmp_path_factory.mktemp("stages")
    script = HELPERS / "nni" / "nni_stages.py"
    result = run(str(script), nni_compat.__file__, str(folder / "masks.pth"))
    assert result.returncode == 0, result.stderr[-2000:]
    in_order, left = json.loads(result.stdout.splitlines()[-1])
    return in_order, left


@pytest.mark.parametrize(
    ("patch", "symptom", "needed"),
    [
        ("wrap_types_without_their_parameters", "__type_params__", NEW_WRAPS),
        ("skip_builtins_without_module", "no attribute 'startswith'", CURRENT_TORCH),
        ("accept_new_is_impure_signature", "positional argument", CURRENT_TORCH),
        ("index_instructions_by_offset", "IndexError", NEW_BYTECODE),
        ("know_new_jumps", "__bool__ should return bool", NEW_JUMPS),
        ("call_functions_as_documented", "norm() received an invalid combination", True),
        ("leave_annotations_unread", "name 'Tensor' is not defined", True),
        ("let_replacements_answer_as_the_class", "object is not subscriptable", True),
        ("run_leaves_without_replacements", "Expected bool, got True", CURRENT_TORCH),
        ("import_without_replacements", "type() takes 2 positional arguments", True),
        ("keep_sizes_whole", "'tuple' object has no attribute 'numel'", CURRENT_TORCH),
        ("free_randomized_values", "_output_randomize", True),
        ("pass_back_no_gradient", "for *: 'NoneType' and 'Tensor'", True),
        ("find_dimension_of_concatenations", "tuple index out of range", True),
        ("replace_norms_without_statistics", "no attribute 'data'", True),
        ("replace_layer_norms_of_any_shape", "no attribute 'data'", True),
        ("load_masks_files", "Weights only load failed", CURRENT_TORCH),
        ("set_max_steps_of_lightning", "has no setter", LIGHTNING),
        ("trace_default_optimizer_of_transformers", "positional argument", TRANSFORMERS),
        ("patch_loss_of_any_signature", "num_items_in_batch", TRANSFORMERS),
        ("patch_step_of_transformers", "AssertionError", TRANSFORMERS),
        ("add_parameters_beside_those_of_the_model", "list index out of range", True),
    ],
)
def test_each_patch_ends_its_symptom(
    stages: tuple[dict[str, list[str | None]], list[str]], patch: str, symptom: str, needed: bool
) -> None:
    before, after = stages[0][patch]
    if needed:
        assert symptom in (before or "")
    assert symptom not in (after or "")


def test_nothing_is_left_to_patch(stages: tuple[dict[str, list[str | None]], list[str]]) -> None:
    assert stages[1] == []
    assert list(stages[0]) == [patch.__name__ for patch in nni_compat.PATCHES]


def test_import_prints_nothing_and_leaves_the_filters_alone() -> None:
    count = "; import warnings; print(len(warnings.filters))"
    # With Lightning imported, torch 2.6 leaves a temporary folder that is cleaned up at the end of the process.
    # Typeguard, which NNI imports, uses what Python 3.12 deprecates.
    options = ("-W", "default", "-W", "ignore::ResourceWarning", "-W", "ignore:ast.:DeprecationWarning", "-c")
    ours = run(*options, "import nni_jackpot, nni.compression.speedup" + count)
    plain = run(*options, "import nni.compression.speedup" + count)
    assert ours.stderr == ""
    assert ours.stdout == plain.stdout
    assert not CURRENT_TORCH or "_register_pytree_node" in plain.stderr


def state() -> list[Any]:
    proxy = concrete_proxy.ConcreteProxy
    return [
        concrete_tracer.functools,
        concrete_tracer._Patcher,
        concrete_tracer._create_wrapped_leaf_func,
        concrete_tracer.ConcreteTracer.run_target,
        concrete_tracer.OperatorPatcherContext.__enter__,
        operator_patcher.compile,
        concrete_tracer.node_is_impure_wrapper,
        len(concrete_tracer.ConcreteTracer.default_autowrap_leaf_function),
        concrete_proxy.dis,
        proxy.jump_opcodes,
        proxy.jump_before_opcodes,
        speedup_utils.tree_map,
        speedup_utils.tree_flatten,
        vars(NodeInfo)["_output_randomize"],
        NoChangeMaskUpdater.indirect_activation,
        NoChangeMaskUpdater.indirect_getitem,
        dependency.build_channel_dependency,
        mask_conflict.build_channel_dependency,
        len(dependency.CALL_FUNCTION_CONCAT + dependency.CALL_FUNCTION_REDUCE),
        dict(replace_module),
        ModelSpeedup.__init__,
        Evaluator._optimizer_add_param_group,
        *(
            getattr(TransformersEvaluator, name)
            for name in (
                "_init_optimizer_helpers",
                "patch_loss",
                "patch_optimizer_step",
                "revert_optimizer_step",
            )
        ),
    ]


def test_patches_are_idempotent() -> None:
    before = state()
    nni_compat.apply()
    for patch in nni_compat.PATCHES:
        patch()
    assert state() == before


def test_only_functions_that_the_tracer_cannot_place_are_skipped() -> None:
    wrapped = concrete_tracer.ConcreteTracer.default_autowrap_leaf_function
    assert all(function in wrapped for function in (torch.zeros, torch.cat, torch.add, F.relu, F.linear))


def test_instructions_are_found_at_their_offset() -> None:
    code = state.__code__
    found = list(concrete_proxy.dis.get_instructions(code))
    exact = list(dis.get_instructions(code))
    for instruction, following in itertools.pairwise(exact):
        index = instruction.offset // 2
        assert found[index].offset == instruction.offset
        assert found[index + 1].offset == following.offset


def test_masks_files_still_run_no_code(tmp_path: Path) -> None:
    torch.save({"0": {"weight": print}}, tmp_path / "masks.pth")
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    if CURRENT_TORCH:
        with pytest.raises(Exception, match="Weights only load failed"):
            ModelSpeedup(model, torch.randn(2, 3, 8, 8), tmp_path / "masks.pth")
    assert not any("defaultdict" in str(allowed) for allowed in torch.serialization.get_safe_globals())
