"""The implementations of the ops, and the choice among them.

- ``base``: what a backend is.
- ``dispatch``: all backends, which of them are live here, and the plan of one call.
- ``reference``: the executable specification, which materializes every gradient.
- ``chunked``: plain PyTorch with bounded memory, on any device.
- ``cpu``: the compiled C++ kernels (csrc/cpu).
- ``triton``: Triton kernels.
- ``cuda``: the compiled CUDA kernels (csrc/cuda).
"""
