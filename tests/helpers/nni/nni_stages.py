"""Run each patch's check before and after the patch, and print the failures as JSON; not a test.

The process has not imported nni_jackpot: each check must fail in its own way until its patch is applied.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

module_path, masks_path = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "nni_compat", module_path, submodule_search_locations=[str(Path(module_path).parent)]
)
nni_compat = importlib.util.module_from_spec(spec)
sys.modules["nni_compat"] = nni_compat  # so that its files can import each other
spec.loader.exec_module(nni_compat)
(Path(masks_path).parent / "imported_late.py").write_text(
    "from typing import NamedTuple\n\n\nclass Pair(NamedTuple):\n    two: int\n", "utf-8"
)
sys.path.append(str(Path(masks_path).parent))
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
        _batch, _channels, _height, width = x.shape
        return x / width


class Branching(Net):
    def forward(self, x):
        x = self.conv(x)
        if x.shape[1] > 1 and not x.shape[0] == 1:  # noqa: SIM201  # a jump after UNARY_NOT
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


class Normalizing(Net):
    def forward(self, x):
        return F.normalize(self.last(self.conv(x)))


class Annotated(Net):
    def forward(self, x: Tensor):
        return self.last(self.conv(x))


class Casting(Net):
    def forward(self, x):
        return cast(list[torch.Tensor], [self.last(self.conv(x))])[0]


class Unpooling(Net):
    def forward(self, x):
        x, indices = F.max_pool2d(self.conv(x), 2, return_indices=True)
        return self.last(F.max_unpool2d(x, indices, 2))


class Importing(Net):
    def forward(self, x):
        import imported_late

        return self.last(self.conv(x)) * imported_late.Pair(2).two


class Stacking(Net):
    def forward(self, x):
        x = self.conv(x)
        return self.last(torch.hstack([x, x])[:, : x.shape[1]])


class Normed(Net):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


class NormedLast(Normed):
    def forward(self, x):
        return self.last(self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


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
    assert model.conv.out_channels == 2
    assert model(x).shape[1] == 2


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
        masks_path + ".trainer",
        use_cpu=True,
        report_to=[],
        max_steps=2,
        disable_tqdm=True,
        save_strategy="no",
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
    evaluator.trainer.optimizer.optimizer = None  # as in an optimizer that holds another one
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
    "call_functions_as_documented": lambda: trace(Normalizing()),
    "leave_annotations_unread": lambda: trace(Annotated()),
    "let_replacements_answer_as_the_class": lambda: trace(Casting()),
    "run_leaves_without_replacements": lambda: trace(Unpooling()),
    "import_without_replacements": lambda: trace(Importing()),
    "keep_sizes_whole": lambda: speedup(Sized()),
    "free_randomized_values": lambda: speedup(Counted()),
    "pass_back_no_gradient": lambda: speedup(Unpooling()),
    "find_dimension_of_concatenations": lambda: speedup(Stacking()),
    "replace_norms_without_statistics": lambda: speedup(Normed(nn.BatchNorm2d(4, track_running_stats=False))),
    "replace_layer_norms_of_any_shape": lambda: speedup(NormedLast(nn.LayerNorm(4, bias=False))),
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
for patch in nni_compat.PATCHES:
    before = failure(patch.__name__)
    patch()
    stages[patch.__name__] = [before, failure(patch.__name__)]
print(json.dumps([stages, [name for name in CHECKS if failure(name)]]))
