"""Compare our updates of training methods with public implementations, on the same tensors.

Needs checkouts of google-research/jaxpruner and TimDettmers/sparse_learning, with jax, flax, optax, chex,
scipy and matplotlib installed:

    python benchmarks/originals.py JAXPRUNER SPARSE_LEARNING
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.training import Gradual, RigL, SparseMomentum, Step, initial_masks

SEEDS = 20
ENDLESS = 10**9  # steps, so that no fraction has decayed


def main() -> None:
    """Print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jaxpruner", help="checkout")
    parser.add_argument("sparse_learning", help="checkout")
    arguments = parser.parse_args()
    sys.path[:0] = [arguments.jaxpruner, arguments.sparse_learning]
    compare_jaxpruner()
    compare_sparse_learning()


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, gradients, and a mask that keeps 300 of 1,000 weights."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 40, 25, generator=generator)
    mask = (torch.randperm(1000, generator=generator) < 300).view(40, 25)
    return weight * mask, gradient, mask


def compare_jaxpruner() -> None:
    """Compare RigL's update, the cubic law, magnitude pruning and Erdős-Rényi-Kernel densities."""
    import jax

    for name in ("map", "flatten", "unflatten", "leaves"):  # names of earlier versions of jax
        setattr(jax, f"tree_{name}", getattr(jax.tree_util, f"tree_{name}"))
    import jax.numpy as jnp
    import numpy as np
    from jaxpruner import mask_calculator, sparsity_distributions, sparsity_schedules
    from jaxpruner.algorithms import sparse_trainers

    def theirs(mask: Any) -> Tensor:
        return torch.from_numpy(np.array(mask)).bool()

    rigl = sparse_trainers.RigL.__new__(sparse_trainers.RigL)
    rigl.eps, rigl.is_debug, rigl.topk_fn = 1e-5, False, mask_calculator.topk_mask_calculator
    equal = {"RigL, an update": 0, "gradual, the last update": 0}
    for seed in range(SEEDS):
        weight, gradient, mask = layer(seed)
        w, g, m = (jnp.array(tensor.numpy()) for tensor in (weight, gradient, mask.byte()))
        updated = theirs(rigl._update_masks(m, jnp.abs(w), jnp.abs(g), 0.25))
        step = Step(1, ENDLESS, 0.1, {}, {}, 0, {"a": 300})
        RigL(fraction=0.25, every=1).update({"a": mask}, {"a": weight}, {"a": gradient}, step)
        equal["RigL, an update"] += torch.equal(mask, updated)
        pruned = theirs(mask_calculator.topk_mask_calculator(jnp.abs(g), 0.7))
        full = torch.ones_like(mask)
        last = Step(10, 10, 0.1, {}, {}, 0, {"a": 300})
        Gradual(every=1, until=1.0).update({"a": full}, {"a": gradient}, {}, last)
        equal["gradual, the last update"] += torch.equal(full, pruned)
    for name, count in equal.items():
        print(f"jaxpruner: {name}: equal masks for {count} of {SEEDS} layers")

    schedule = sparsity_schedules.PolynomialSchedule(1, 0, 75)
    weight, mask = torch.randn(10_000), torch.ones(10_000, dtype=torch.bool)
    apart = 0.0
    for number in range(1, 76):  # its step 0 is our step 1
        step = Step(number, 100, 0.1, {}, {}, 0, {"a": 1000})
        Gradual(every=1, until=0.75).update({"a": mask}, {"a": weight}, {}, step)
        wanted = float(schedule.get_sparsity_at_step(0.9, number - 1))
        apart = max(apart, abs(1 - mask.float().mean().item() - wanted))
    print(f"jaxpruner: gradual, the cubic law: sparsity differs by at most {apart:.0e} of 10,000 weights")

    shapes = {"a": (32, 16, 3, 3), "b": (64, 32, 3, 3), "c": (64, 64, 1, 1)}
    found = sparsity_distributions.erk({n: jnp.zeros((*s[2:], s[1], s[0])) for n, s in shapes.items()}, 0.9)
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    total = sum(weight.numel() for weight in weights.values())
    masks = initial_masks(weights, total - int(0.9 * total))
    apart = max(abs(1 - mask.float().mean().item() - found[name]) for name, mask in masks.items())
    print(f"jaxpruner: Erdős-Rényi-Kernel: sparsity of a layer differs by at most {apart:.0e}")


def compare_sparse_learning() -> None:
    """Compare sparse momentum's update."""
    from sparselearning.core import CosineDecay, Masking
    from sparselearning.funcs import growth_funcs, prune_funcs, redistribution_funcs

    apart = 0
    keep = {"0.weight": 400, "1.weight": 100}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 50, bias=False), nn.Linear(50, 10, bias=False))
        weights = dict(model.named_parameters())
        masks = {n: (torch.randperm(w.numel()) < keep[n]).view_as(w) for n, w in weights.items()}
        momentum = {n: torch.randn_like(w) * (1 + i) for i, (n, w) in enumerate(weights.items())}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for name, weight in weights.items():
            weight.data *= masks[name]
            optimizer.state[weight]["momentum_buffer"] = momentum[name]
        theirs = Masking(optimizer, prune_rate_decay=CosineDecay(0.25, 1000), prune_rate=0.25)
        theirs.modules, theirs.names, theirs.baseline_nonzero = [model], list(keep), 500
        theirs.masks = {name: mask.float() for name, mask in masks.items()}
        theirs.redistribution_func = redistribution_funcs["momentum"]
        theirs.growth_func, theirs.prune_func = growth_funcs["momentum"], prune_funcs["magnitude"]
        theirs.global_prune = theirs.global_growth = False
        dense = {name: weight.detach().clone() for name, weight in weights.items()}
        theirs.truncate_weights()
        step = Step(1, ENDLESS, 0.1, momentum, {}, 0, keep)
        SparseMomentum(rate=0.25, every=1).update(masks, dense, momentum, step)
        apart = max(apart, *(int((masks[name] != theirs.masks[name].bool()).sum()) for name in keep))
    print(f"sparse_learning: sparse momentum, an update: masks of 1,000 and 500 weights differ by {apart}")


if __name__ == "__main__":
    main()
