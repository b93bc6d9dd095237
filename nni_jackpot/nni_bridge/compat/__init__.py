"""Patches that let NNI 3.0 run on current PyTorch and Python; applied when NNI is imported.

NNI is archived. Its pruning quick start (a pruner, then ``ModelSpeedup``) fails on PyTorch 2 (upstream issue
5768), and its evaluators fail on Lightning 2 and Transformers 5. Each patch fixes one cause from outside. It
is a no-op with library versions that do not need it, and does not change anything that already works.
"""

from __future__ import annotations

from collections.abc import Callable

from .classes import (
    import_without_replacements,
    let_replacements_answer_as_the_class,
    run_leaves_without_replacements,
)
from .evaluators import (
    add_parameters_beside_those_of_the_model,
    patch_loss_of_any_signature,
    patch_step_of_transformers,
    set_max_steps_of_lightning,
    trace_default_optimizer_of_transformers,
)
from .replacers import replace_layer_norms_of_any_shape, replace_norms_without_statistics
from .speedup import (
    find_dimension_of_concatenations,
    free_randomized_values,
    import_without_registering_twice,
    keep_sizes_whole,
    load_masks_files,
    pass_back_no_gradient,
)
from .tracer import (
    accept_new_is_impure_signature,
    call_functions_as_documented,
    index_instructions_by_offset,
    know_new_jumps,
    leave_annotations_unread,
    skip_builtins_without_module,
    wrap_types_without_their_parameters,
)

_applied = False


def apply() -> None:
    """Apply all patches, once per process."""
    global _applied
    if not _applied:
        for patch in PATCHES:
            patch()
        _applied = True


PATCHES: tuple[Callable[[], None], ...] = (
    import_without_registering_twice,
    wrap_types_without_their_parameters,
    skip_builtins_without_module,
    accept_new_is_impure_signature,
    index_instructions_by_offset,
    know_new_jumps,
    call_functions_as_documented,
    leave_annotations_unread,
    let_replacements_answer_as_the_class,
    run_leaves_without_replacements,
    import_without_replacements,
    keep_sizes_whole,
    free_randomized_values,
    pass_back_no_gradient,
    find_dimension_of_concatenations,
    replace_norms_without_statistics,
    replace_layer_norms_of_any_shape,
    load_masks_files,
    set_max_steps_of_lightning,
    trace_default_optimizer_of_transformers,
    patch_loss_of_any_signature,
    patch_step_of_transformers,
    add_parameters_beside_those_of_the_model,
)
