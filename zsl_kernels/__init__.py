"""Per-example gradient inner products and destructive-interference sums, without materializing every per-example gradient.

Notation, used throughout the library:

- N examples, T positions, K input features, O output features;
- ``a`` (N, T, K): a layer's inputs;
- ``b`` (N, T, O): the gradients of Σ_i ℓ_i with respect to the layer's outputs;
- g_i = b_iᵀ a_i (O, K): the gradient of example i.

All functions share these properties:

- **Inputs** are float32, bfloat16, float16 or float64 and may have any strides. An ``a`` that is expanded over the examples is
  read only once.
- **Results** are accumulated in float32 or better and returned in float32 (float64 for float64 inputs).
- **Derivatives**: every function is differentiable once in its floating-point tensor arguments, unless its documentation says
  otherwise.
- **Compilation** with ``torch.compile(fullgraph=True)`` works for every function except :func:`linear_cross_entropy` and
  :func:`coordinate_sums`, whose results are numbers.
- **Implementation**: ``impl`` is "auto", which follows :func:`plan`, or the name of an implementation: "reference", "chunked",
  "cpu", "triton" or "cuda". A named implementation never falls back to another one.

Ragged rows: if the rows of a batch do not form an (N, T, ·) tensor, such as the tokens routed to one expert of a mixture, pass
``example_ids`` (R,), integers in any order, and ``num_examples`` N. Then ``a`` is (R, K), ``b`` is (R, O), and
g_i = Σ_{r: example_ids[r] = i} b_r a_rᵀ. The gradient of an example without rows is zero.

Three modules are public for code that builds on the library:

- ``streamed_head``: the pieces of a classification head that never materializes its logits;
- ``weight_uses``: replacements for the operations that use a weight, which a probe installs;
- ``planning``: the cost model.

``ops`` and ``backends`` contain the implementation. Each package starts with a list of its modules.
"""

from zsl_kernels.backends.dispatch import build_info, plan
from zsl_kernels.ops.coordinate_sums import coordinate_sums, coordinate_sums_of_many
from zsl_kernels.ops.dense_interference import dense_interference
from zsl_kernels.ops.dot import dot
from zsl_kernels.ops.embedding_interference import embedding_interference
from zsl_kernels.ops.gram import gram
from zsl_kernels.ops.interference import interference
from zsl_kernels.ops.linear_cross_entropy import linear_cross_entropy
from zsl_kernels.ops.scale_bias_grad import bias_grad, scale_bias_grad, scale_grad
from zsl_kernels.ops.sq_norm import sq_norm
from zsl_kernels.ops.weighted_grad import weighted_grad
from zsl_kernels.types import CoordinateSums, EmbeddingSums, InterferenceSums

__all__ = [
    "CoordinateSums",
    "EmbeddingSums",
    "InterferenceSums",
    "bias_grad",
    "build_info",
    "coordinate_sums",
    "coordinate_sums_of_many",
    "dense_interference",
    "dot",
    "embedding_interference",
    "gram",
    "interference",
    "linear_cross_entropy",
    "plan",
    "scale_bias_grad",
    "scale_grad",
    "sq_norm",
    "weighted_grad",
]
__version__ = "0.1.0"
