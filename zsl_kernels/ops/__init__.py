"""The ops. Each file defines a public function, its registered op, the op's fake and its derivative.

- ``registration``: helpers that define an op.
- ``operands``: argument checks that several ops share.
- ``interference``, ``gram``, ``sq_norm``, ``dot``, ``weighted_grad``: statistics computed from a layer's inputs and output
  gradients. ``interference_backward`` is the derivative of the first three.
- ``dense_interference``, ``embedding_interference``, ``scale_bias_grad``: statistics of small or sparse parameters.
- ``coordinate_sums``: sums over the coordinates of those statistics.
- ``linear_cross_entropy``: a classification head with its losses.

``zsl_kernels`` exports the functions. This package does not, because they would shadow the modules with the same names.
"""
