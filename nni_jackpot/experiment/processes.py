"""A run by several processes, started by torchrun: each takes a share of every batch."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nni_jackpot.errors import JackpotError
from nni_jackpot.runtime.distributed import world_size


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started, for the block; without torchrun, do nothing.

    Raises
    ------
    JackpotError
        If this machine has GPUs, but fewer GPUs than processes.
    """
    if not distributed.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise JackpotError(
                f"{here} processes on this machine, allowed: up to one for each of {gpus} GPUs"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend)
    try:
        yield
    finally:
        gc.collect()  # wrapped models are reference cycles, and must not outlive their process group
        distributed.destroy_process_group()


def averaged(model: nn.Module) -> nn.Module:
    """Return a model whose gradients are averaged over all processes; the model itself for one process."""
    return DistributedDataParallel(model) if world_size() > 1 else model
