"""The ops, one file each: public function, registered op, its fake and its derivative.

- ``registration``: how an op is defined; ``operands``: the checks that several share.
- ``interference``, ``gram``, ``sq_norm``, ``dot``, ``weighted_grad``: of inputs and output gradients; ``interference_backward`` is
  the derivative of the first three.
- ``dense_interference``, ``embedding_interference``, ``scale_bias_grad``: of parameters that are small or sparse.
- ``coordinate_sums``: of the results.
- ``linear_cross_entropy``: a classification head with its losses.

The functions are exported by ``zsl_kernels``, not here, where they would hide the modules of their names.
"""
