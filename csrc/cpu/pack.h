// Packing: a block of an operand becomes panels that the register tile reads front to back. It is also where a dtype is widened.
//
// A panel holds W features of consecutive positions: panel[step][w][d], where a step contracts `depth` positions (2 for the native
// bf16 product, else 1). Features past the block's end and the missing half of an odd pair are zeros.

namespace zsl::ZSL_ISA {

ZSL_INLINE float widen(float x) { return x; }
ZSL_INLINE double widen(double x) { return x; }

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

ZSL_INLINE float widen(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

// The half's exponent and mantissa, moved to a float's place, are a float whose exponent is 112 too small; one exact product by
// 2^112 repairs that for subnormals too, and only Inf and NaN need the all-ones exponent set by hand.
ZSL_INLINE float widen(f16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t scaled = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (31u << 23) ? (0xffu << 23) : 0;
  return __builtin_bit_cast(float, sign | scaled | special);
}

// How panels are stored and contracted. Elem is what a panel holds, Sum what the register tile accumulates; `together` examples at
// most are formed side by side.
template <class S>
struct Dense {
  using Elem = S;
  using Sum = S;
  static constexpr int depth = 1;
  static constexpr int together = 1;
};

// bf16 kept as it is, two positions side by side: what vdpbf16ps contracts.
struct Bf16Pairs {
  using Elem = uint16_t;
  using Sum = float;
  static constexpr int depth = 2;
  static constexpr int together = 1;
};

template <class P>
ZSL_INLINE int64_t steps_of(int64_t positions) {
  return (positions + P::depth - 1) / P::depth;
}

template <class In, class P>
ZSL_INLINE typename P::Elem to_elem(In x) {
  if constexpr (P::depth == 2)
    return x.bits;
  else
    return static_cast<typename P::Elem>(widen(x));
}

ZSL_INLINE int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// One position's W features into panel slots that lie `depth` apart.
template <class In, class P, int W>
ZSL_INLINE void pack_row(const In* src, int64_t stride, int64_t count, typename P::Elem* dst) {
  constexpr int depth = P::depth;
  if (count >= W && stride == 1) {
    for (int w = 0; w < W; ++w) dst[w * depth] = to_elem<In, P>(src[w]);
  } else {
    for (int w = 0; w < W; ++w) dst[w * depth] = w < count ? to_elem<In, P>(src[w * stride]) : typename P::Elem{};
  }
}

// Two positions' W features, interleaved.
template <class In, class P, int W>
ZSL_INLINE void pack_row_pair(const In* src, const In* next, int64_t stride, int64_t count, typename P::Elem* dst) {
  if (count >= W && stride == 1) {
    for (int w = 0; w < W; ++w) {
      dst[2 * w] = to_elem<In, P>(src[w]);
      dst[2 * w + 1] = to_elem<In, P>(next[w]);
    }
  } else {
    pack_row<In, P, W>(src, stride, count, dst);
    pack_row<In, P, W>(next, stride, count, dst + 1);
  }
}

// Positions [t0, t0+tn) and features [f0, f0+fn) of example n, as ceil(fn/W) panels. Rows outer: memory is read in its own order.
template <class In, class P, int W>
void pack_as(const Operand& x, int64_t n, int64_t t0, int64_t tn, int64_t f0, int64_t fn, typename P::Elem* dst) {
  const In* base = static_cast<const In*>(x.data) + n * x.sn + t0 * x.st + f0 * x.sf;
  const int64_t steps = steps_of<P>(tn), panel = steps * W * P::depth;
  for (int64_t s = 0; s < steps; ++s) {
    const In* src = base + s * P::depth * x.st;
    typename P::Elem* out = dst + s * W * P::depth;
    for (int64_t f = 0; f < fn; f += W, out += panel) {
      const In* at = src + f * x.sf;
      // Rows lie a page or so apart, where hardware prefetching stops: without this, packing costs a third of the product.
      for (int w = 0; w < W; w += 64 / static_cast<int>(sizeof(In))) __builtin_prefetch(at + 16 * P::depth * x.st + w);
      if constexpr (P::depth == 1) {
        pack_row<In, P, W>(at, x.sf, fn - f, out);
      } else if (2 * s + 1 < tn) {
        pack_row_pair<In, P, W>(at, at + x.st, x.sf, fn - f, out);
      } else {
        pack_row<In, P, W>(at, x.sf, fn - f, out);
        for (int w = 0; w < W; ++w) out[2 * w + 1] = 0;
      }
    }
  }
}

template <class P, int W>
void pack(const Operand& x, int64_t n, int64_t t0, int64_t tn, int64_t f0, int64_t fn, typename P::Elem* dst) {
  if constexpr (P::depth == 2) {
    pack_as<bf16, P, W>(x, n, t0, tn, f0, fn, dst);
  } else if constexpr (sizeof(typename P::Sum) == 8) {
    pack_as<double, P, W>(x, n, t0, tn, f0, fn, dst);
  } else {
    switch (x.dtype) {
      case DType::f32:
        return pack_as<float, P, W>(x, n, t0, tn, f0, fn, dst);
      case DType::bf16:
        return pack_as<bf16, P, W>(x, n, t0, tn, f0, fn, dst);
      default:
        return pack_as<f16, P, W>(x, n, t0, tn, f0, fn, dst);
    }
  }
}

// The transposed block: W rows side by side, contracted along the features [f0, f0+fn). Rows are flattened (example, position)
// pairs: row r is position r % T of example r / T.
template <class In, class S, int W>
void pack_transposed_as(const Operand& x, int64_t T, int64_t r0, int64_t rn, int64_t f0, int64_t fn, S* dst) {
  for (int64_t p = 0; p < rn; p += W, dst += fn * W) {
    for (int w = 0; w < W; ++w) {
      if (p + w >= rn) {
        for (int64_t f = 0; f < fn; ++f) dst[f * W + w] = 0;
        continue;
      }
      const int64_t r = r0 + p + w;
      const In* src = static_cast<const In*>(x.data) + (r / T) * x.sn + (r % T) * x.st + f0 * x.sf;
      for (int64_t f = 0; f < fn; ++f) dst[f * W + w] = widen(src[f * x.sf]);
    }
  }
}

template <class S, int W>
void pack_transposed(const Operand& x, int64_t T, int64_t r0, int64_t rn, int64_t f0, int64_t fn, S* dst) {
  if constexpr (sizeof(S) == 8) {
    pack_transposed_as<double, S, W>(x, T, r0, rn, f0, fn, dst);
  } else {
    switch (x.dtype) {
      case DType::f32:
        return pack_transposed_as<float, S, W>(x, T, r0, rn, f0, fn, dst);
      case DType::bf16:
        return pack_transposed_as<bf16, S, W>(x, T, r0, rn, f0, fn, dst);
      default:
        return pack_transposed_as<f16, S, W>(x, T, r0, rn, f0, fn, dst);
    }
  }
}

}  // namespace zsl::ZSL_ISA
