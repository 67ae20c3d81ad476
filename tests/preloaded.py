"""What a training run imports, for a server that forks runs off (`forked`)."""

import gc
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
importlib.import_module("megatron_adamba.engine.launch").import_deepspeed()
for name in (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron_adamba.config.cli",
    "megatron_adamba.training.report",
    "megatron_adamba.training.trainer",
):
    importlib.import_module(name)
gc.collect()
gc.freeze()
