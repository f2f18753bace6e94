"""Where there is no NVIDIA GPU, triton runs its kernels in its interpreter; it has to hear that before it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
