"""GPU kernels, one folder per operation: `naive.py` in plain torch says what, `triton.py` does it fast, README why so."""
