"""What the machine does while it trains, under the names that MLflow's page of system metrics shows."""

import psutil
import torch

MEGABYTE = 1e6


def system_metrics(device: torch.device) -> dict[str, float]:
    """Use of processors (since the last call), memory and card at this moment.

    A card whose driver does not say how busy it is, or how much power it takes, is left out.
    """
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
    }
    return metrics | (_card_metrics(device) if device.type == "cuda" else {})


def _card_metrics(device: torch.device) -> dict[str, float]:
    name = f"system/gpu_{device.index or 0}"
    free, total = torch.cuda.mem_get_info(device)
    metrics = {
        f"{name}_memory_usage_megabytes": (total - free) / MEGABYTE,
        f"{name}_memory_usage_percentage": 100 * (1 - free / total),
    }
    try:
        busy, milliwatts = torch.cuda.utilization(device), torch.cuda.power_draw(device)
    except Exception:  # NVML's own errors, a container without it, a card that has no sensor: a training goes on
        return metrics
    return metrics | {f"{name}_utilization_percentage": busy, f"{name}_power_usage_watts": milliwatts / 1e3}
