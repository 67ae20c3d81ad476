"""Joining the other ranks, whichever launcher started this process: deepspeed, torchrun, srun, or none."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import importlib
import logging
import os
import warnings

import torch
import torch.distributed as dist

from megatron_adamba.engine.environment import complete_environment
from megatron_adamba.engine.environment import first_host as first_host
from megatron_adamba.engine.job import RankInfo
from megatron_adamba.engine.lost_ranks import lost_ranks_named as lost_ranks_named
from megatron_adamba.ops.host_memory import keep_freed_pages

_TIMEOUT = datetime.timedelta(minutes=30)


def start_distributed() -> RankInfo:
    """Set up torch.distributed through DeepSpeed: NCCL with a GPU, gloo without. Safe to call once per process.

    Raises ConfigError where the launcher's variables contradict each other.
    """
    complete_environment()
    cuda = torch.cuda.is_available()
    if not cuda:
        keep_freed_pages()
    deepspeed = import_deepspeed()
    backend = "nccl" if cuda else "gloo"
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        # one process a container, which sees one GPU, is told no rank of its own there
        local_rank %= torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(local_rank)
        torch.cuda.set_device(local_rank)
    _spare_the_collector()
    if not dist.is_initialized():
        deepspeed.init_distributed(backend, verbose=False, auto_mpi_discovery=False, timeout=_TIMEOUT)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return RankInfo(dist.get_rank(), dist.get_world_size(), local_rank, device, backend)


def import_deepspeed():
    """DeepSpeed, quiet, and with its C++ shared-memory collectives off: building them needs a compiler and minutes."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13 renames a collective that DeepSpeed and torch 2.9 know by its old name
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.utils").logger.setLevel(logging.ERROR)
    compatible = importlib.import_module("deepspeed.ops").__compatible_ops__
    compatible["deepspeed_shm_comm"] = False
    return deepspeed


def _spare_the_collector() -> None:
    """Keep what the libraries built at import out of garbage collection for good.

    DeepSpeed collects ten times while it builds an optimizer; with a million objects of the libraries in the way each
    costs a quarter of a second. Its check of the optimizer pulls in torch's compiler, so that comes first.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()
        # what is still frozen at the end, libraries report as leaked
        atexit.register(gc.unfreeze)


def stop_distributed() -> None:
    """Leave the group; quiet when it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size_from_environment() -> int:
    """Ranks that the launcher started, before anything is set up."""
    complete_environment()
    return int(os.environ["WORLD_SIZE"])
