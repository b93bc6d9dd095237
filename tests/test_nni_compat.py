"""NNI's pruning and speedup on the installed PyTorch and Python, with each repair and without."""

from __future__ import annotations

import copy
import dis
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_proxy, concrete_trace, concrete_tracer
from nni.compression.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LevelPruner
from nni.compression.speedup import ModelSpeedup
from nni.compression.speedup import utils as speedup_utils
from nni.compression.speedup.container import NodeInfo
from nni.compression.utils import Evaluator, TransformersEvaluator
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

import nni_jackpot  # noqa: F401
from nni_jackpot import nni_compat

CURRENT_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
NEW_BYTECODE = sys.version_info >= (3, 11)
NEW_JUMPS = NEW_BYTECODE and sys.version_info[:2] != (3, 12)  # which has the old names again
NEW_WRAPS = sys.version_info >= (3, 12)
LIGHTNING = find_spec("pytorch_lightning") is not None
TRANSFORMERS = find_spec("transformers") is not None and find_spec("accelerate") is not None


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


# Run before any repair: each check must fail in its own way, which its repair must end. A file of its own, as the
# tracer reads the source of what it traces, and in a process that has not imported nni_jackpot.
STAGES = """
import importlib.util
import json
import sys

import torch
from torch import nn

module_path, masks_path = sys.argv[1:]
spec = importlib.util.spec_from_file_location("nni_compat", module_path)
nni_compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nni_compat)
x = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.last(self.conv(x))


class Unpacking(Net):
    def forward(self, x):
        x = self.last(self.conv(x))
        batch, channels, height, width = x.shape
        return x / width


class Branching(Net):
    def forward(self, x):
        x = self.conv(x)
        if x.shape[1] > 1 and not x.shape[0] == 1:
            x = self.last(x)
        return x


class Sized(Net):
    def forward(self, x):
        x = self.last(self.conv(x))
        return x / x.shape[1:].numel()


class Counted(Net):
    def forward(self, x):
        x = self.last(self.conv(x))
        return x / len(x.shape)


def trace(model):
    from nni.common.concrete_trace_utils import concrete_trace

    concrete_trace(model, (x,))


def speedup(model, to_file=False):
    from nni.compression.pruning import L1NormPruner
    from nni.compression.speedup import ModelSpeedup

    pruner = L1NormPruner(model, [{"op_names": ["conv"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    if to_file:
        torch.save(masks, masks_path)
    ModelSpeedup(model, x, masks_path if to_file else masks).speedup_model()
    assert model.conv.out_channels == 2 and model(x).shape[1] == 2


def set_max_steps():
    import pytorch_lightning

    pytorch_lightning.Trainer(logger=False, accelerator="cpu").fit_loop.max_steps = 3


class WithLoss(nn.Linear):
    def forward(self, x, labels=None):
        return {"loss": super().forward(x).square().mean()}


def transformers_evaluator():
    import nni
    from nni.compression.utils import TransformersEvaluator
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        masks_path + ".trainer", use_cpu=True, report_to=[], max_steps=2, disable_tqdm=True, save_strategy="no"
    )
    model = WithLoss(2, 2)
    rows = [{"x": torch.ones(2), "labels": 0} for _ in range(16)]
    evaluator = TransformersEvaluator(nni.trace(Trainer)(model, arguments, train_dataset=rows))
    static_method = vars(Trainer)["get_optimizer_cls_and_kwargs"]
    try:
        evaluator._init_optimizer_helpers(model)
        assert vars(Trainer)["get_optimizer_cls_and_kwargs"] is static_method
    finally:
        Trainer.get_optimizer_cls_and_kwargs = static_method
    evaluator.bind_model(model)
    return evaluator


def patch_loss():
    losses = []
    evaluator = transformers_evaluator()
    evaluator.patch_loss(lambda loss, batch: losses.append(loss) or 2 * loss)
    evaluator.train()
    assert len(losses) == 2


def patch_step():
    calls = []
    evaluator = transformers_evaluator()
    evaluator.trainer.optimizer.optimizer = None  # as of an optimizer that holds another: not to be unwrapped
    evaluator.patch_optimizer_step([lambda: calls.append("before")], [])
    evaluator.patch_optimizer_step([], [lambda: calls.append("after")])
    evaluator.train()
    evaluator.train(max_steps=3)
    assert calls == 5 * ["before", "after"]
    evaluator.revert_optimizer_step()
    evaluator.train()
    assert len(calls) == 10


def add_beside_a_token():
    from nni.compression.utils import Evaluator

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Evaluator()._optimizer_add_param_group(model, {"scores": [nn.Parameter(x)]}, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 3


CHECKS = {
    "wrap_types_without_their_parameters": lambda: trace(Net()),
    "skip_builtins_without_module": lambda: trace(Net()),
    "accept_new_is_impure_signature": lambda: trace(Net()),
    "index_instructions_by_offset": lambda: trace(Unpacking()),
    "know_new_jumps": lambda: trace(Branching()),
    "keep_sizes_whole": lambda: speedup(Sized()),
    "free_randomized_values": lambda: speedup(Counted()),
    "load_masks_files": lambda: speedup(Net(), to_file=True),
    "add_parameters_beside_those_of_the_model": add_beside_a_token,
}
if importlib.util.find_spec("pytorch_lightning"):
    CHECKS["set_max_steps_of_lightning"] = set_max_steps
if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
    CHECKS["trace_default_optimizer_of_transformers"] = transformers_evaluator
    CHECKS["patch_loss_of_any_signature"] = patch_loss
    CHECKS["patch_step_of_transformers"] = patch_step


def failure(name):
    try:
        CHECKS.get(name, lambda: None)()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


stages = {}
for repair in nni_compat.REPAIRS:
    before = failure(repair.__name__)
    repair()
    stages[repair.__name__] = [before, failure(repair.__name__)]
print(json.dumps([stages, [name for name in CHECKS if failure(name)]]))
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str | None]], list[str]]:
    """Return how each repair's check failed before and after the repair, and the checks that fail in the end."""
    folder = tmp_path_factory.mktemp("stages")
    script = folder / "stages.py"
    script.write_text(STAGES, "utf-8")
    result = run(str(script), nni_compat.__file__, str(folder / "masks.pth"))
    assert result.returncode == 0, result.stderr[-2000:]
    in_order, left = json.loads(result.stdout.splitlines()[-1])
    return in_order, left


@pytest.mark.parametrize(
    ("repair", "symptom", "needed"),
    [
        ("wrap_types_without_their_parameters", "__type_params__", NEW_WRAPS),
        ("skip_builtins_without_module", "no attribute 'startswith'", CURRENT_TORCH),
        ("accept_new_is_impure_signature", "positional argument", CURRENT_TORCH),
        ("index_instructions_by_offset", "IndexError", NEW_BYTECODE),
        ("know_new_jumps", "__bool__ should return bool", NEW_JUMPS),
        ("keep_sizes_whole", "'tuple' object has no attribute 'numel'", CURRENT_TORCH),
        ("free_randomized_values", "_output_randomize", True),
        ("load_masks_files", "Weights only load failed", CURRENT_TORCH),
        ("set_max_steps_of_lightning", "has no setter", LIGHTNING),
        ("trace_default_optimizer_of_transformers", "positional argument", TRANSFORMERS),
        ("patch_loss_of_any_signature", "num_items_in_batch", TRANSFORMERS),
        ("patch_step_of_transformers", "AssertionError", TRANSFORMERS),
        ("add_parameters_beside_those_of_the_model", "list index out of range", True),
    ],
)
def test_each_repair_ends_its_symptom(
    stages: tuple[dict[str, list[str | None]], list[str]], repair: str, symptom: str, needed: bool
) -> None:
    before, after = stages[0][repair]
    if needed:
        assert symptom in (before or "")
    assert symptom not in (after or "")


def test_nothing_is_left_to_repair(stages: tuple[dict[str, list[str | None]], list[str]]) -> None:
    assert stages[1] == []
    assert list(stages[0]) == [repair.__name__ for repair in nni_compat.REPAIRS]


def test_import_prints_nothing_and_leaves_the_filters_alone() -> None:
    count = "; import warnings; print(len(warnings.filters))"
    # Torch 2.6 leaves a temporary folder to be cleaned up as the process ends, once Lightning is imported.
    # Typeguard, which NNI imports, uses what Python 3.12 deprecates.
    options = ("-W", "default", "-W", "ignore::ResourceWarning", "-W", "ignore:ast.:DeprecationWarning", "-c")
    ours = run(*options, "import nni_jackpot" + count)
    plain = run(*options, "import nni.compression.speedup" + count)
    assert ours.stderr == ""
    assert ours.stdout == plain.stdout
    assert not CURRENT_TORCH or "_register_pytree_node" in plain.stderr


def state() -> list[Any]:
    proxy = concrete_proxy.ConcreteProxy
    return [
        concrete_tracer.functools,
        concrete_tracer.node_is_impure_wrapper,
        len(concrete_tracer.ConcreteTracer.default_autowrap_leaf_function),
        concrete_proxy.dis,
        proxy.jump_opcodes,
        proxy.jump_before_opcodes,
        speedup_utils.tree_map,
        speedup_utils.tree_flatten,
        vars(NodeInfo)["_output_randomize"],
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


def test_repairs_are_idempotent() -> None:
    before = state()
    nni_compat.apply()
    for repair in nni_compat.REPAIRS:
        repair()
    assert state() == before


def test_only_functions_that_the_tracer_cannot_place_are_skipped() -> None:
    wrapped = concrete_tracer.ConcreteTracer.default_autowrap_leaf_function
    assert all(function in wrapped for function in (torch.zeros, torch.cat, torch.add, F.relu, F.linear))


def test_instructions_are_found_at_their_offset() -> None:
    code = speedup.__code__
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


class Recording(ModelSpeedup):
    """Keeps the masks that the speedup makes real: the user's, widened where layers must agree."""

    fixed: dict[str, dict[str, Tensor | None]]

    def initialize_propagate(self, args: Any) -> None:
        # A later step overwrites the masks in ways that no longer describe the small model.
        self.fixed = copy.deepcopy(self.masks)
        super().initialize_propagate(args)


def set_activations_to_scale(model: nn.Module, x: Tensor) -> None:
    """Set the batch norms so that neither a masked channel leaks (it must stay 0) nor all outputs vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_mean is not None
        norm.running_mean.zero_()
    model.eval()


def speedup(
    model: nn.Module, size: int, config_list: list[dict[str, Any]], pruner_class: Any = L1NormPruner
) -> tuple[float, Tensor, Tensor]:
    """Prune and speed up; return the share of parameters left and the masked and the small model's outputs."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size)
    set_activations_to_scale(model, x)
    total = sum(p.numel() for p in model.parameters())
    pruner = pruner_class(model, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    masked = copy.deepcopy(model)
    recording = Recording(model, x, masks)
    recording.speedup_model()
    with torch.no_grad():
        for name, targets in recording.fixed.items():
            for target, mask in targets.items():
                if mask is not None:
                    masked.get_submodule(name).get_parameter(target).mul_(mask)
    model.eval()  # NNI leaves the modules it made in training mode.
    after = model(x)
    after.sum().backward()
    return sum(p.numel() for p in model.parameters()) / total, masked(x).detach(), after.detach()


CONVOLUTIONS: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def small_vgg() -> nn.Module:
    model = models.vgg11_bn()
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, 10)
    return model


def small_vit() -> nn.Module:
    model = models.VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
    nn.init.normal_(model.heads.head.weight)  # All 0 at first, which lets no gradient through.
    return model


@pytest.mark.parametrize(
    ("make", "size", "config_list"),
    [
        pytest.param(models.resnet18, 32, CONVOLUTIONS, id="resnet18"),
        pytest.param(models.mobilenet_v2, 32, CONVOLUTIONS, id="mobilenet_v2"),
        pytest.param(models.mobilenet_v3_small, 32, CONVOLUTIONS, id="mobilenet_v3_small"),
        pytest.param(small_vgg, 32, CONVOLUTIONS, id="vgg11_bn"),
        pytest.param(models.densenet121, 32, CONVOLUTIONS, id="densenet121"),
        pytest.param(
            lambda: models.squeezenet1_0(dropout=0.0),
            48,
            [{**CONVOLUTIONS[0], "exclude_op_names": ["classifier.1"]}],
            id="squeezenet1_0",
        ),
        pytest.param(models.efficientnet_b0, 32, CONVOLUTIONS, id="efficientnet_b0"),
        pytest.param(models.mnasnet0_5, 32, CONVOLUTIONS, id="mnasnet0_5"),
        pytest.param(models.regnet_x_400mf, 32, CONVOLUTIONS, id="regnet_x_400mf"),
        pytest.param(
            lambda: models.googlenet(aux_logits=False, init_weights=False), 32, CONVOLUTIONS, id="googlenet"
        ),
        pytest.param(
            lambda: models.inception_v3(aux_logits=False, init_weights=False),
            96,
            CONVOLUTIONS,
            id="inception_v3",
        ),
        pytest.param(
            small_vit, 32, [{"op_names_re": [r".*mlp\.0"], "sparse_ratio": 0.5}], id="vision_transformer"
        ),
    ],
)
def test_torchvision_models_shrink_and_compute_the_same(
    make: Callable[[], nn.Module], size: int, config_list: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)  # mobilenet_v3_small differs with some random weights, one in twelve tried
    left, masked, after = speedup(make(), size, config_list)
    assert left < 0.92
    assert after.isfinite().all()
    assert masked.abs().max() > 0
    torch.testing.assert_close(after, masked, rtol=1e-3, atol=1e-4 * masked.abs().max().item())


@pytest.mark.parametrize("pruner_class", [LevelPruner, L2NormPruner, FPGMPruner])
def test_other_pruners_work(pruner_class: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    left, masked, after = speedup(model, 8, [{"op_names": ["0"], "sparse_ratio": 0.5}], pruner_class)
    if (
        pruner_class is LevelPruner
    ):  # Single weights leave no channel to take away, and their masks are dropped.
        assert left == 1.0
    else:
        assert left < 0.6
        torch.testing.assert_close(after, masked, rtol=1e-3, atol=1e-4)


def test_a_traced_model_computes_the_same() -> None:
    model = models.resnet18().eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(concrete_trace(model, (x,))(x), model(x))
