// Packing: copies a block of an operand into panels that the micro-kernel reads sequentially, and widens the dtype.
//
// A panel holds W features of consecutive positions as panel[step][w][d]. One step contracts `depth` positions: 2 for the native
// bf16 product, otherwise 1. Features past the end of the block and the missing half of an odd pair are zeros.

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

// Moving the exponent and mantissa of a half to their place in a float yields a float whose exponent is 112 too small. One exact
// multiplication by 2^112 corrects this, including for subnormals. Only Inf and NaN need the all-ones exponent set explicitly.
ZSL_INLINE float widen(f16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t scaled = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (31u << 23) ? (0xffu << 23) : 0;
  return __builtin_bit_cast(float, sign | scaled | special);
}

// How panels are stored and contracted. Elem is the element type of a panel, and Sum is the accumulator type of the register tile.
// At most `together` examples are computed in one group.
template <class S>
struct Dense {
  using Elem = S;
  using Sum = S;
  static constexpr int depth = 1;
  static constexpr int together = 1;
};

// bf16 values without widening, with pairs of positions interleaved, as vdpbf16ps expects them.
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

// Copies W features of one position into panel slots at a distance of `depth`.
template <class In, class P, int W>
ZSL_INLINE void pack_row(const In* src, int64_t stride, int64_t count, typename P::Elem* dst) {
  constexpr int depth = P::depth;
  if (count >= W && stride == 1) {
    for (int w = 0; w < W; ++w) dst[w * depth] = to_elem<In, P>(src[w]);
  } else {
    for (int w = 0; w < W; ++w) dst[w * depth] = w < count ? to_elem<In, P>(src[w * stride]) : typename P::Elem{};
  }
}

// Copies W features of two positions, interleaved.
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

// Packs positions [t0, t0+tn) and features [f0, f0+fn) of example n into ceil(fn/W) panels. The outer loop runs over rows, so that
// memory is read in order.
template <class In, class P, int W>
void pack_as(const Operand& x, int64_t n, int64_t t0, int64_t tn, int64_t f0, int64_t fn, typename P::Elem* dst) {
  const In* base = static_cast<const In*>(x.data) + n * x.sn + t0 * x.st + f0 * x.sf;
  const int64_t steps = steps_of<P>(tn), panel = steps * W * P::depth;
  for (int64_t s = 0; s < steps; ++s) {
    const In* src = base + s * P::depth * x.st;
    typename P::Elem* out = dst + s * W * P::depth;
    for (int64_t f = 0; f < fn; f += W, out += panel) {
      const In* at = src + f * x.sf;
      // Consecutive rows are about a page apart, and hardware prefetching stops at page boundaries. Without this prefetch, packing
      // takes a third of the time of the product.
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

// Packs the transposed block: W rows side by side, to be contracted along features [f0, f0+fn). Rows are flattened (example,
// position) pairs: row r is position r % T of example r / T.
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
