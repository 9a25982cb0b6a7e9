// SIMD vectors of one instruction set, built on the compiler's vector extension.
//
// Each kernels_<isa>.cpp includes this file once, inside its target region. It first defines ZSL_ISA (a namespace), ZSL_VEC_BYTES,
// ZSL_ROWS and ZSL_COL_VECS.

#define ZSL_INLINE __attribute__((always_inline)) inline

namespace zsl::ZSL_ISA {

template <class S>
struct VecTypes;

template <>
struct VecTypes<float> {
  typedef float V __attribute__((vector_size(ZSL_VEC_BYTES)));
  typedef float Unaligned __attribute__((vector_size(ZSL_VEC_BYTES), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(ZSL_VEC_BYTES)));
  static constexpr int32_t magnitude = 0x7fffffff;
};

template <>
struct VecTypes<double> {
  typedef double V __attribute__((vector_size(ZSL_VEC_BYTES)));
  typedef double Unaligned __attribute__((vector_size(ZSL_VEC_BYTES), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(ZSL_VEC_BYTES)));
  static constexpr int64_t magnitude = 0x7fffffffffffffff;
};

template <class S>
using Vec = typename VecTypes<S>::V;

template <class S>
inline constexpr int lanes = ZSL_VEC_BYTES / sizeof(S);

template <class S>
ZSL_INLINE Vec<S> load(const S* p) {
  return *reinterpret_cast<const typename VecTypes<S>::Unaligned*>(p);
}

template <class S>
ZSL_INLINE void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename VecTypes<S>::Unaligned*>(p) = v;
}

template <class S>
ZSL_INLINE Vec<S> abs(Vec<S> v) {
  using Bits = typename VecTypes<S>::Bits;
  return (Vec<S>)((Bits)v & VecTypes<S>::magnitude);
}

// Returns sign(v)·x, with the sign of torch.sign: the result is 0 where v is 0 and NaN where v is NaN.
template <class S>
ZSL_INLINE Vec<S> times_sign(Vec<S> v, Vec<S> x) {
  return v > 0 ? x : (v < 0 ? -x : v * S(0));
}

// A vector of doubles with as many lanes as a vector of S. It accumulates the lanes of a scalar in double, so that the rounding
// error does not grow with the size of the tile.
template <class S>
struct WideTypes {
  typedef double V __attribute__((vector_size(sizeof(double) * ZSL_VEC_BYTES / sizeof(S))));
};

template <class S>
using Wide = typename WideTypes<S>::V;

template <class S>
ZSL_INLINE void add_lanes(Wide<S>& sum, Vec<S> v) {
  sum += __builtin_convertvector(v, Wide<S>);
}

template <class S>
ZSL_INLINE double total(const Wide<S>& sum) {
  double s = 0;
  for (int i = 0; i < lanes<S>; ++i) s += sum[i];
  return s;
}

// Adds the lanes in double, so that the rounding error of a scalar does not grow with the size of the tile.
template <class S>
ZSL_INLINE double sum_lanes(Vec<S> v) {
  double s = 0;
  for (int i = 0; i < lanes<S>; ++i) s += v[i];
  return s;
}

}  // namespace zsl::ZSL_ISA
