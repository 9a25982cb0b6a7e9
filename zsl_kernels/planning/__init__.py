"""Which way a call is computed.

- ``call``: what the choice depends on, and what a candidate is.
- ``devices``, ``tiles``: what is known about GPUs and about the compiled kernels' tiles.
- ``cpu_cost``, ``gpu_cost``: the candidates with their predicted times.
- ``choose``: the plan.
"""
