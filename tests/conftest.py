"""What holds for every test: where there is no NVIDIA GPU, triton runs its kernels in its interpreter, and has to hear that
before it is imported; and ctrl-C interrupts, also where a shell started the tests in the background."""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
