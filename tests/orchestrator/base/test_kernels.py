"""What a process is told before it computes on a GPU."""

import os
import subprocess
import sys

SHOWS = """
import os, sys, torch
from orchestrator.base.kernels import make_repeatable
make_repeatable(torch.device(sys.argv[1]))
b = torch.backends
print(b.cudnn.allow_tf32, b.cudnn.conv.fp32_precision == "tf32", b.cuda.matmul.allow_tf32,
      torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


def settings(device):
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    return subprocess.run(
        [sys.executable, "-c", SHOWS, device], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()


def test_convolutions_take_all_of_float32_and_give_the_same_bits_each_time():
    assert settings("cpu")[:2] == ["True", "True"], "torch's own default, on newer GPUs"
    assert settings("cuda") == ["False", "False", "False", "True", ":4096:8"]
