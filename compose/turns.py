"""Models are built one at a time in a process.

While diffusers and transformers read a model they replace `torch.nn.Module`'s own way of registering parameters, for
all threads: a model built meanwhile in another is left without data, and so may be every one after it.
"""

from __future__ import annotations

import threading

BUILDING = threading.RLock()  # held while a model is built and its weights are read
