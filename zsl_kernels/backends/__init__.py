"""The implementations of the ops, and the dispatch to them.

- ``base``: the interface of a backend.
- ``dispatch``: the list of backends, their availability on this machine, and the plan of a call.
- ``reference``: the executable specification, which materializes every gradient. It is not a backend.
- ``chunked``: plain PyTorch with bounded memory, on any device.
- ``cpu``: the compiled C++ kernels (csrc/cpu).
- ``triton``: Triton kernels.
- ``cuda``: the compiled CUDA kernels (csrc/cuda).
"""
