"""Where an op runs: a Triton kernel on a GPU (or in Triton's interpreter), plain PyTorch everywhere else."""

import functools
import os

import torch
from torch import Tensor
from triton.runtime.driver import driver

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this variable when it is imported, so it is fixed for the life of the process."""

HOPPER = (9, 0)


def use_kernel(tensor: Tensor) -> bool:
    """Whether an op on `tensor` launches its Triton kernel; its plain PyTorch path runs otherwise.

    Meta tensors count: with them kernels/bench/resources.py compiles every launch on a machine without a GPU.
    """
    return tensor.is_cuda or tensor.is_meta or INTERPRETED


def is_hopper(tensor: Tensor) -> bool:
    """Whether kernels that only Hopper has the instructions for run on `tensor`, or are compiled for if it is meta."""
    if tensor.is_meta:
        return bool(divmod(driver.active.get_current_target().arch, 10) == HOPPER)
    return tensor.is_cuda and capability(tensor.device) == HOPPER


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Number of multiprocessors of `device`; 2 in the interpreter, so that split reductions really split there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def check_gradient(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check a gradient that a kernel adds to.

    Raises: ValueError: wrong shape, not fp32, or not contiguous.
    """
    check_rows(name, tensor, shape, torch.float32)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: it must be contiguous")


def check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return `tensor` if it is a pitched matrix of `shape`: last dimension contiguous, any row stride.

    Raises: ValueError: wrong shape or dtype, or columns that are not adjacent in memory.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has column stride {tensor.stride(-1)}: its last dimension must be contiguous")
    return tensor
