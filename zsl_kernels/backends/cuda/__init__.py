"""The CUDA backend: it launches the compiled kernels of csrc/cuda.

- ``backend``: the backend class, which selects the launch of a call.
- ``persistent``, ``hopper``: launches for a layer's inputs and output gradients, for compute capability 8.0 and newer, and for 9.0.
- ``embedding``, ``rows``: launches for embeddings, and for materialized gradients, scales and biases.
- ``slabs``, ``partials``: helpers for Gram matrices, and for partial results of blocks.
- ``module``: loads the compiled kernels.
- ``recorded``: repeats a call without Python.
"""
