// The primitives of csrc/cuda/device/hopper_device.cuh for threads of a CPU.
//
// A copy of a box happens when its barrier is waited for, and a product when its group is: the latest time that the memory model
// allows, so that what is read too early is old. With ZSL_SIMT_EARLY a copy happens at once, the earliest time, so that what is
// overwritten too early is new.
#pragma once

#include "device.cuh"

namespace zsl {

constexpr int box_positions = 64, box_features = 64, box_bytes = box_positions * box_features * 2;

struct TensorMap {
  const unsigned char* data;
  uint64_t sizes[4];    // features, positions, examples, parts
  uint64_t strides[3];  // bytes
};

inline unsigned char* dynamic_shared_of_boxes() {
  unsigned char* const bytes = simt::block->shared;
  if (reinterpret_cast<uintptr_t>(bytes) % 1024) simt::fail("the shared memory of boxes is not aligned");
  return bytes;
}

struct Barrier {
  int32_t arrivals, missing, bytes;
  uint16_t phase, made;
};

inline void happened(const void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<void*>(what));
#else
  (void)what;
#endif
}
inline void seen(const void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<void*>(what));
#else
  (void)what;
#endif
}

ZSL_UNSEEN inline void check_made(const Barrier* b) {
  if (b->made != 0x5a5a) simt::fail("a barrier that was not made");
}
ZSL_UNSEEN inline void end_phase(Barrier* b) {
  if (b->missing == 0 && b->bytes == 0) b->phase ^= 1, b->missing = b->arrivals, simt::block->progress();
}
ZSL_UNSEEN inline void barrier_init(Barrier* b, int arrivals) { *b = {arrivals, arrivals, 0, 0, 0x5a5a}; }
inline void barriers_made() {}
ZSL_UNSEEN inline void arrive_at(Barrier* b, int bytes) {
  check_made(b);
  if (b->missing == 0) simt::fail("a barrier that too many arrive at");
  b->bytes += bytes, --b->missing;
  end_phase(b);
}
inline void barrier_arrive(Barrier* b) {
  happened(b);
  arrive_at(b, 0);
}
inline void barrier_expect(Barrier* b, int bytes) {
  happened(b);
  arrive_at(b, bytes);
}

inline int swizzled(int row, int byte) { return row * 128 + (byte ^ (row % 8 * 16)); }

struct Box {
  unsigned char* to;
  const TensorMap* map;
  Barrier* barrier;
  int at[4];
};
// Sanitizers see what is read and written.
inline void copy_now(const Box& box) {
  const TensorMap& map = *box.map;
  if (reinterpret_cast<uintptr_t>(box.to) % 1024) simt::fail("a box that is not aligned");
  for (int t = 0; t < box_positions; ++t)
    for (int f = 0; f < box_features; ++f) {
      const int64_t at[4] = {box.at[0] + f, box.at[1] + t, box.at[2], box.at[3]};
      bool inside = true;
      int64_t from = at[0] * 2;
      for (int d = 0; d < 4; ++d) inside = inside && at[d] >= 0 && static_cast<uint64_t>(at[d]) < map.sizes[d];
      for (int d = 1; d < 4; ++d) from += at[d] * static_cast<int64_t>(map.strides[d - 1]);
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map.data + from, 2);
      std::memcpy(box.to + swizzled(t, 2 * f), &value, 2);
    }
}
ZSL_UNSEEN inline void count_bytes(Barrier* b) {
  b->bytes -= box_bytes;
  end_phase(b);
}
// Copies that have not happened yet.
constexpr int most_boxes = 256;
inline Box boxes_under_way[most_boxes];
inline int box_count = 0;

ZSL_UNSEEN inline void put(const Box& box) {
  if (box_count == most_boxes) simt::fail("more copies under way than the emulation holds");
  boxes_under_way[box_count++] = box;
}
ZSL_UNSEEN inline bool take(const Barrier* b, Box& box) {
  for (int i = 0; i < box_count; ++i)
    if (boxes_under_way[i].barrier == b) {
      box = boxes_under_way[i], boxes_under_way[i] = boxes_under_way[--box_count];
      return true;
    }
  return false;
}
inline void copy_box(void* to, const TensorMap* map, Barrier* b, int feature, int position, int example, int part) {
  const Box box = {static_cast<unsigned char*>(to), map, b, {feature, position, example, part}};
  happened(b);
#if defined(ZSL_SIMT_EARLY)
  copy_now(box);
  happened(b);
  count_bytes(b);
#else
  put(box);
#endif
}
// The copies of a barrier at which everybody has arrived.
inline void copy_all_of(Barrier* b) {
  seen(b);
  for (Box box; take(b, box);) {
    copy_now(box);
    happened(b);
    count_bytes(b);
  }
}
ZSL_UNSEEN inline bool goes_on(const Barrier* b, int parity) { return (b->phase & 1) == (parity & 1); }
ZSL_UNSEEN inline bool all_arrived(const Barrier* b) { return b->missing == 0; }
inline void barrier_wait(Barrier* b, int parity) {
  check_made(b);
  while (goes_on(b, parity)) {
    if (all_arrived(b)) copy_all_of(b);
    if (goes_on(b, parity)) simt::block->yield();
  }
  seen(b);
}

template <int Registers>
void give_registers() {}
template <int Registers>
void take_registers() {}

// c (64, 128) of a warpgroup: its threads meet when a group is waited for.
struct Product {
  float* c;
  const unsigned char *b, *a;
  bool add, bfloat16;
  int group;
};
struct Products {
  std::vector<Product> under_way;
  int group = 0;
};
inline Products& products_of_thread() {
  static std::vector<Products> all(1024);
  return all.at(threadIdx.x);
}
using BoxPlace = const unsigned char*;
inline BoxPlace place_of(const void* box) { return static_cast<BoxPlace>(box); }
inline BoxPlace further(BoxPlace box, int positions) { return box + positions * 128; }
inline void add_product(float* c, BoxPlace b, BoxPlace a, bool add, bool bfloat16) {
  Products& mine = products_of_thread();
  mine.under_way.push_back({c, b, a, add, bfloat16, mine.group});
}
inline void multiply_boxes_bfloat16(float (&c)[64], BoxPlace b, BoxPlace a, bool add) { add_product(c, b, a, add, true); }
inline void multiply_boxes_float16(float (&c)[64], BoxPlace b, BoxPlace a, bool add) { add_product(c, b, a, add, false); }
inline void products_begin() {}
inline void products_commit() { ++products_of_thread().group; }

ZSL_UNSEEN inline float number(const unsigned char* box, const unsigned char* shared, int position, int feature, bool bfloat16) {
  // Where a product begins within a box the permutation goes on as from the box's first row.
  const auto begin = static_cast<int>(box - shared);
  const int at = begin + feature / box_features * box_bytes + position * 128 + feature % box_features * 2;
  uint16_t bits;
  std::memcpy(&bits, shared + (at ^ (at / 128 % 8 * 16)), 2);
  return bfloat16 ? widen_bfloat16(bits) : widen_float16(bits);
}
ZSL_UNSEEN inline void multiply_together(Product** threads) {
  const Product& one = *threads[0];
  const unsigned char* const shared = simt::block->shared;
  static float b[16][64], a[16][128];
  for (int t = 0; t < 16; ++t) {
    for (int f = 0; f < 64; ++f) b[t][f] = number(one.b, shared, t, f, one.bfloat16);
    for (int f = 0; f < 128; ++f) a[t][f] = number(one.a, shared, t, f, one.bfloat16);
  }
  for (int thread = 0; thread < 128; ++thread) {
    const Product& mine = *threads[thread];
    if (mine.a != one.a || mine.b != one.b || mine.add != one.add) simt::fail("a warpgroup's threads multiply different boxes");
    for (int e = 0; e < 64; ++e) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8, col = e / 4 * 8 + thread % 4 * 2 + e % 2;
      float sum = mine.add ? mine.c[e] : 0;
      for (int t = 0; t < 16; ++t) sum += b[t][row] * a[t][col];
      mine.c[e] = sum;
    }
  }
}
template <int Left>
void products_wait() {
  Products& mine = products_of_thread();
  while (!mine.under_way.empty() && mine.under_way.front().group < mine.group - Left) {
    Product next = mine.under_way.front();
    mine.under_way.erase(mine.under_way.begin());
    simt::block->meet<128>(&next, multiply_together);
  }
}

inline uint32_t nearest_bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline uint32_t round_to_bfloat16(float x, float y) { return nearest_bfloat16_bits(x) | nearest_bfloat16_bits(y) << 16; }

template <class T>
T hidden(T x) {
  return x;
}

}  // namespace zsl
