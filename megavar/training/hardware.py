"""What this rank's device can do and holds: peak FLOP/s for the MFU, and the most memory used."""

import gc
import logging
import os
import resource

import torch

logger = logging.getLogger(__name__)

PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets (SXM versions where not named). With FP8
the MFU is still relative to these."""


def peak_flops() -> float | None:
    """bf16 peak of this rank's GPU; None where it is unknown, as on CPUs."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib() -> float:
    """Most memory this rank has held so far: allocated on its GPU, or resident on CPUs."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux


def free_memory() -> int:
    """Bytes that this rank's device, or the machine where that is the CPU, has free."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release_memory() -> None:
    """Give the device memory that nothing refers to any more back to the driver, for servers; nothing on CPUs."""
    if not torch.cuda.is_available():
        return
    gc.collect()  # models and optimizers refer to themselves in circles
    torch.cuda.empty_cache()
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    logger.info("GPU memory: %.1f of %.1f GiB are free after this stage.", free, total)
