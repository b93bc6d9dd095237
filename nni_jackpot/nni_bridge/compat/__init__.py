"""Patches that let NNI 3.0 run on current PyTorch and Python; applied when nni_jackpot is imported.

NNI is archived. Its pruning quick start (a pruner, then ``ModelSpeedup``) fails on PyTorch 2 (upstream issue
5768), and its evaluators fail on Lightning 2 and Transformers 5. Each patch fixes one cause from outside. It
is a no-op with library versions that do not need it, and does not change anything that already works.
"""

from __future__ import annotations

from collections.abc import Callable

from . import classes, evaluators, replacers, speedup, tracer

_applied = False


def apply() -> None:
    """Apply all patches, once per process."""
    global _applied
    if not _applied:
        for patch in PATCHES:
            patch()
        _applied = True


PATCHES: tuple[Callable[[], None], ...] = (
    speedup.import_without_registering_twice,
    tracer.wrap_types_without_their_parameters,
    tracer.skip_builtins_without_module,
    tracer.accept_new_is_impure_signature,
    tracer.index_instructions_by_offset,
    tracer.know_new_jumps,
    tracer.call_functions_as_documented,
    tracer.leave_annotations_unread,
    classes.let_replacements_answer_as_the_class,
    classes.run_leaves_without_replacements,
    classes.import_without_replacements,
    speedup.keep_sizes_whole,
    speedup.free_randomized_values,
    speedup.pass_back_no_gradient,
    speedup.find_dimension_of_concatenations,
    replacers.replace_norms_without_statistics,
    replacers.replace_layer_norms_of_any_shape,
    speedup.load_masks_files,
    evaluators.set_max_steps_of_lightning,
    evaluators.trace_default_optimizer_of_transformers,
    evaluators.patch_loss_of_any_signature,
    evaluators.patch_step_of_transformers,
    evaluators.add_parameters_beside_those_of_the_model,
)
