// scale_bias_grad: computes each example's gradients of a scale and a bias, Σ_t b (x - mean) rstd and Σ_t b, in one pass over x and
// b.
//
// A block has one example and a piece of the columns. Each thread has the columns that fill 16 bytes of the narrower operand. The
// threads form rows of `lanes` threads. The rows take the positions in turn, four at a time, and their sums are added pairwise.
#pragma once

#include <device.cuh>

#include "numbers.cuh"
#include "row_args.h"

namespace zsl {

constexpr int scale_rows = 4;  // positions that a thread processes at a time

template <class X, class B>
constexpr int scale_columns = per_16_bytes<X> > per_16_bytes<B> ? per_16_bytes<X> : per_16_bytes<B>;

template <class X, class B, bool scaled>
constexpr size_t scale_shared_bytes = sizeof(float) * row_threads * scale_columns<X, B> * (scaled ? 2 : 1);

// Grid: (N × pieces of the columns, parts of the positions). X is the type of x, or of b if there is no x.
template <class X, class B, bool scaled>
__global__ void __launch_bounds__(row_threads, 2) scale_bias_kernel(const __grid_constant__ ScaleBiasArgs args) {
  constexpr int length = scale_columns<X, B>;
  const int thread = static_cast<int>(threadIdx.x), lanes = args.lanes, rows = row_threads / lanes, row = thread / lanes;
  const int64_t pieces = (args.features + lanes * length - 1) / (lanes * length);
  const int64_t example = blockIdx.x / pieces, k = (blockIdx.x % pieces * lanes + thread % lanes) * length;
  const int left = static_cast<int>(args.features - k < length ? args.features - k : length);
  const int64_t first = args.begin ? args.begin[example] : 0;
  const int64_t count = args.begin ? args.begin[example + 1] - first : args.positions;
  const int64_t from = first + count * blockIdx.y / gridDim.y, to = first + count * (blockIdx.y + 1) / gridDim.y;
  const typename B::Bits* const b =
      static_cast<const typename B::Bits*>(args.b.data) + example * args.b.example + k * args.b.feature;
  const typename X::Bits* const x =
      static_cast<const typename X::Bits*>(args.x.data) + (scaled ? example * args.x.example + k * args.x.feature : 0);

  float scale[length] = {}, bias[length] = {};
  for (int64_t t = from + row; t < to; t += scale_rows * rows) {
    const typename B::Bits* b_rows[scale_rows];
    const typename X::Bits* x_rows[scale_rows];
    float mean[scale_rows], rstd[scale_rows];
#pragma unroll
    for (int i = 0; i < scale_rows; ++i) {
      const bool there = t + i * rows < to;
      const int64_t place = !there ? 0 : args.order ? args.order[t + i * rows] : t + i * rows;
      b_rows[i] = there ? b + place * args.b.position : nullptr;
      x_rows[i] = there && scaled ? x + place * args.x.position : nullptr;
      mean[i] = there && scaled && args.mean ? args.mean[example * args.mean_example + place * args.mean_position] : 0;
      rstd[i] = there && scaled && args.rstd ? args.rstd[example * args.rstd_example + place * args.rstd_position] : 1;
    }
    Numbers<B, length> bs[scale_rows];
    Numbers<X, length> xs[scale_rows];
    load_rows(bs, b_rows, args.b.feature, left, args.b.vectors);
    if (scaled) load_rows(xs, x_rows, args.x.feature, left, args.x.vectors);
#pragma unroll
    for (int i = 0; i < scale_rows; ++i)
#pragma unroll
      for (int j = 0; j < length; ++j) {
        const float value = bs[i][j];
        if (scaled) scale[j] += value * ((xs[i][j] - mean[i]) * rstd[i]);
        bias[j] += value;
      }
  }

  // (columns of a thread, threads): the sums of the bias, followed by those of the scale.
  float* const shared = reinterpret_cast<float*>(dynamic_shared()) + thread;
#pragma unroll
  for (int j = 0; j < length; ++j) {
    shared[j * row_threads] = bias[j];
    if (scaled) shared[(length + j) * row_threads] = scale[j];
  }
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half)
#pragma unroll
      for (int j = 0; j < (scaled ? 2 : 1) * length; ++j) shared[j * row_threads] += shared[j * row_threads + half * lanes];
  }
  if (row > 0) return;
  const int64_t at = blockIdx.y * args.next_part + example * args.features + k;
#pragma unroll
  for (int j = 0; j < length; ++j) {
    if (j < left && args.bias) args.bias[at + j] = shared[j * row_threads];
    if (j < left && scaled && args.scale) args.scale[at + j] = shared[(length + j) * row_threads];
  }
}

}  // namespace zsl
