// Fills the kernel table of one instruction set. Each kernels_<isa>.cpp includes this file last.

namespace zsl::ZSL_ISA {

// Selects the storage format of the panels. a and b have the same dtype. Only the forward products use bf16 directly. The
// derivatives widen bf16 to float.
template <class F>
auto with_panels(const Operand& a, F body) {
  if (a.dtype == DType::f64) return body(Dense<double>{});
#if defined(ZSL_AMX)
  if (a.dtype == DType::bf16) {
    const TileUnit unit;
    return body(Bf16Tiles{});
  }
#elif defined(ZSL_NATIVE_BF16)
  if (a.dtype == DType::bf16) return body(Bf16Pairs{});
#endif
  return body(Dense<float>{});
}

template <class F>
auto with_sum(const Operand& a, F body) {
  return a.dtype == DType::f64 ? body(double{}) : body(float{});
}

size_t interference_workspace(const InterferenceArgs& args) {
  return with_panels(args.a, [&](auto p) { return interference_as<decltype(p)>(args, 0, 0, nullptr, nullptr); });
}

void interference_worker(const InterferenceArgs& args, int64_t begin, int64_t end, void* workspace,
                         const InterferencePartials& out) {
  with_panels(args.a, [&](auto p) { return interference_as<decltype(p)>(args, begin, end, workspace, &out); });
}

size_t gram_workspace(const GramArgs& args) {
  return with_panels(args.a, [&](auto p) { return gram_as<decltype(p)>(args, 0, 0, nullptr, nullptr); });
}

void gram_worker(const GramArgs& args, int64_t begin, int64_t end, void* workspace, double* gram) {
  with_panels(args.a, [&](auto p) { return gram_as<decltype(p)>(args, begin, end, workspace, gram); });
}

size_t weighted_workspace(const WeightedArgs& args) {
  return with_panels(args.a, [&](auto p) { return weighted_as<decltype(p)>(args, 0, 0, nullptr); });
}

void weighted_worker(const WeightedArgs& args, int64_t begin, int64_t end, void* workspace) {
  with_panels(args.a, [&](auto p) { return weighted_as<decltype(p)>(args, begin, end, workspace); });
}

size_t backward_shared(const BackwardArgs& args) {
  return with_sum(args.a, [&](auto s) { return backward_shared_as<decltype(s)>(args); });
}

size_t backward_workspace(const BackwardArgs& args) {
  return with_sum(args.a, [&](auto s) { return backward_as<decltype(s)>(args, 0, 0, 0, nullptr, nullptr); });
}

void backward_mix_worker(const BackwardArgs& args, int64_t tile, int64_t begin, int64_t end, void* workspace, void* shared) {
  with_sum(args.a, [&](auto s) { return backward_mix_as<decltype(s)>(args, tile, begin, end, workspace, shared); });
}

void backward_worker(const BackwardArgs& args, int64_t tile, int64_t begin, int64_t end, void* workspace, const void* shared) {
  with_sum(args.a, [&](auto s) { return backward_as<decltype(s)>(args, tile, begin, end, workspace, shared); });
}

size_t ghost_workspace(const GramArgs& args) {
  return with_sum(args.a, [&](auto s) { return ghost_as<decltype(s)>(args, false, 0, 0, nullptr, nullptr); });
}

void ghost_worker(const GramArgs& args, bool diagonal, int64_t begin, int64_t end, void* workspace, double* out) {
  with_sum(args.a, [&](auto s) { return ghost_as<decltype(s)>(args, diagonal, begin, end, workspace, out); });
}

void coordinates_worker(const CoordinateArgs& args, int64_t begin, int64_t end, double* out) {
  if (args.dtype == DType::f64)
    args.u ? coordinates_as<double, true>(args, begin, end, out) : coordinates_as<double, false>(args, begin, end, out);
  else
    args.u ? coordinates_as<float, true>(args, begin, end, out) : coordinates_as<float, false>(args, begin, end, out);
}

size_t scale_bias_workspace(const PositionArgs& args) {
  return args.sums == DType::f64 ? scale_bias_as<double>(args, 0, 0, nullptr) : scale_bias_as<float>(args, 0, 0, nullptr);
}

void scale_bias_worker(const PositionArgs& args, int64_t begin, int64_t end, void* workspace) {
  args.sums == DType::f64 ? scale_bias_as<double>(args, begin, end, workspace) : scale_bias_as<float>(args, begin, end, workspace);
}

size_t row_interference_workspace(const RowArgs& args) {
  return args.rows.sums == DType::f64 ? row_interference_as<double>(args, 0, 0, nullptr, nullptr)
                                      : row_interference_as<float>(args, 0, 0, nullptr, nullptr);
}

void row_interference_worker(const RowArgs& args, int64_t begin, int64_t end, void* workspace, const InterferencePartials& out) {
  args.rows.sums == DType::f64 ? row_interference_as<double>(args, begin, end, workspace, &out)
                               : row_interference_as<float>(args, begin, end, workspace, &out);
}

const Kernels table = {
#define ZSL_STRING_(x) #x
#define ZSL_STRING(x) ZSL_STRING_(x)
    ZSL_STRING(ZSL_ISA),
    interference_workspace,
    interference_worker,
    gram_workspace,
    gram_worker,
    weighted_workspace,
    weighted_worker,
    backward_shared,
    backward_workspace,
    backward_mix_worker,
    backward_worker,
    ghost_workspace,
    ghost_blocks,
    ghost_worker,
    coordinates_worker,
    scale_bias_workspace,
    scale_bias_worker,
    row_interference_workspace,
    row_interference_worker,
};

}  // namespace zsl::ZSL_ISA
