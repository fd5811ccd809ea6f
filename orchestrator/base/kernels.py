"""What a GPU computes with, wherever the bits end up in results: originals, baselines, fixes and their evaluation."""

import os

import torch


def make_repeatable(device: torch.device) -> None:
    """Settings of a process: kernels that give the same bits each time, in all of float32; a CPU needs none.

    On newer GPUs cuDNN rounds the inputs of convolutions to 10 bits (TF32) unless it is told not to. Outputs then
    differ in the third digit from those on a CPU, from those of matrix products that should be the same, and from what
    linear programs over the weights have proved. Recipes that want speed ask for mixed precision.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
