"""Which ways of running several processes are taken, and which are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from dp_trainer import UnsupportedOperationError
from dp_trainer.refusals import refuse_unsupported_backend


def accelerator(kind, **plugin):
    return SimpleNamespace(
        distributed_type=kind,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin) if plugin else None),
    )


REFUSED = {
    "DeepSpeed": (accelerator(DistributedType.DEEPSPEED), "DEEPSPEED"),
    "Megatron": (accelerator(DistributedType.MEGATRON_LM), "MEGATRON_LM"),
    "TPU": (accelerator(DistributedType.XLA), "XLA"),
    "FSDP 1": (accelerator(DistributedType.FSDP, fsdp_version=1, cpu_offload=None), "fsdp_version: 2"),
    "FSDP without a plugin": (accelerator(DistributedType.FSDP), "fsdp_version: 2"),
    "offloading": (
        accelerator(DistributedType.FSDP, fsdp_version=2, cpu_offload=CPUOffloadPolicy()),
        "fsdp_offload_params: false",
    ),
}
TAKEN = {
    "one process": accelerator(DistributedType.NO),
    "GPUs": accelerator(DistributedType.MULTI_GPU),
    "CPUs": accelerator(DistributedType.MULTI_CPU),
    "FSDP 2": accelerator(DistributedType.FSDP, fsdp_version=2, cpu_offload=OffloadPolicy()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    given, fragment = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=fragment):
        refuse_unsupported_backend(given)


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name):
    refuse_unsupported_backend(TAKEN[name])


@pytest.mark.parametrize("offload", [False, True])
def test_accelerate_says_offloading_as_it_is_read_here(offload):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=offload)
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == offload
