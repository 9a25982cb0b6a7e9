"""The cost model: it chooses the algorithm, the backend and the tile of a call from the sizes of its operands.

- ``call``: the inputs of the model (``Call``) and its alternatives (``Candidate``).
- ``devices``, ``tiles``: data about GPUs and about the tiles of the compiled kernels.
- ``cpu_cost``, ``gpu_cost``: functions that list candidates with their predicted times.
- ``choose``: the fastest candidate (``Plan``).
"""
