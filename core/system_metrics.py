"""What the machine does meanwhile, under the names by which MLflow's page has a tab for it. psutil and pynvml are asked
where they are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

Numbers = dict[str, float]
MB = 1e6


def sampler(folder: Path, device: str) -> Callable[[], Numbers]:
    """A function that measures once: CPU, memory, the disk of `folder`, and the GPU if `device` names one."""
    parts: list[Callable[[], Numbers]] = []
    if importlib.util.find_spec("psutil"):
        parts.append(_machine(folder))
    if "cuda" in device:
        parts.append(_gpu(importlib.import_module("torch").cuda.current_device()))
    return lambda: {f"system/{name}": value for part in parts for name, value in part().items()}


def _machine(folder: Path) -> Callable[[], Numbers]:
    psutil = importlib.import_module("psutil")
    process = psutil.Process()
    psutil.cpu_percent()  # the first answer has no interval to be of

    def measure() -> Numbers:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": process.memory_info().rss / MB,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MB,
        }

    return measure


def _gpu(index: int) -> Callable[[], Numbers]:
    torch = importlib.import_module("torch")
    driver = _driver(index)

    def measure() -> Numbers:
        free, total = torch.cuda.mem_get_info(index)
        found = {
            f"gpu_{index}_memory_usage_megabytes": (total - free) / MB,
            f"gpu_{index}_memory_usage_percentage": 100.0 * (1 - free / total),
        }
        if driver is not None:
            found |= driver()
        return found

    return measure


def _driver(index: int) -> Callable[[], Numbers] | None:
    """Utilisation and power, which only NVIDIA's library knows; None without it."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:
        return None

    def measure() -> Numbers:
        return {
            f"gpu_{index}_utilization_percentage": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            f"gpu_{index}_power_usage_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }

    return measure
