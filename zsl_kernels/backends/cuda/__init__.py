"""The CUDA backend.

- ``backend`` picks the launch, ``persistent`` and ``hopper`` have them.
- ``module`` loads the kernels of csrc/cuda.
"""
