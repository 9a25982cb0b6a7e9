"""Per-example gradient inner products and destructive-interference sums, without materializing every per-example gradient.

Letters, the same everywhere: N examples, T positions, K input features, O output features; ``a`` (N, T, K) are a layer's inputs,
``b`` (N, T, O) the gradients of Σ_i ℓ_i with respect to its outputs, and g_i = b_iᵀ a_i (O, K) is the gradient of example i.

All functions take float32, bfloat16, float16 or float64 inputs of any strides (an ``a`` expanded over the examples is read once),
accumulate in float32 or better, and return float32 (float64 for float64 inputs). They are differentiable once in every tensor
argument, and trace under ``torch.compile(fullgraph=True)``, but for :func:`linear_cross_entropy`. ``impl`` names an implementation
("reference", "chunked", "cpu", "triton", "cuda"); "auto" follows :func:`plan`. A named one never falls back.

Where the rows of a batch are not (N, T, ·), like those that reach one expert of a mixture, each names its example: with
``example_ids`` (R,), integers in any order, and ``num_examples`` N, ``a`` is (R, K), ``b`` (R, O) and
g_i = Σ_{r: example_ids[r] = i} b_r a_rᵀ, zero for an example without rows.

Public too, for what embeds more than the functions: ``streamed_head`` (a classification head in pieces), ``weight_uses`` (what
takes the place of a weight's uses under a probe) and ``planning`` (the cost model). ``ops`` and ``backends`` have the
implementation. Each starts with a list of its modules.
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
