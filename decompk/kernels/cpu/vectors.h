// Sixteen, eight or four floats as one value, in GCC's and Clang's own notation: AVX, AVX-512 and NEON alike.
#pragma once

#include <cstring>
#include <memory>
#include <utility>

using Long = long;
typedef float vec16 __attribute__((vector_size(64)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
#ifdef __AVX512F__
typedef vec16 widest;  // what a register holds
#else
typedef vec8 widest;
#endif
constexpr int LANES = sizeof(widest) / sizeof(float);
typedef double doubles __attribute__((vector_size(sizeof(double) * LANES)));  // of `widest`, in double precision

template <typename to, typename from>  // in another precision
inline to as(from value) {
  if constexpr (sizeof(from) <= sizeof(double)) return value;
  else return __builtin_convertvector(value, to);
}

template <typename vec>  // a vector, or a single float
inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename vec>
inline void store(float* to, vec value) {
  std::memcpy(to, &value, sizeof value);
}

// Lanes of a (0 to LANES − 1) and b (from LANES on).
template <int... lane>
inline widest mixed(widest a, widest b) {
  return __builtin_shufflevector(a, b, lane...);
}

// a and b in turns, `each` of their lanes at a time, from their lane `first` on
template <int each, int first, int... i>
inline widest in_turns(widest a, widest b, std::integer_sequence<int, i...>) {
  return mixed<(first + i / (2 * each) * each + i % each + (i / each % 2 ? LANES : 0))...>(a, b);
}
using every_lane = std::make_integer_sequence<int, LANES>;

// The rows of a square become its columns: in each round the second half of a deck of cards comes between the first.
inline void turn(widest (&rows)[LANES]) {
  every_lane all;
#pragma GCC unroll 4
  for (int left = LANES; left > 1; left /= 2) {
    widest next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = in_turns<1, 0>(rows[i], rows[i + LANES / 2], all);
      next[2 * i + 1] = in_turns<1, LANES / 2>(rows[i], rows[i + LANES / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
}

// f(kind, i) for `count` floats in a row, by vectors, then one by one
template <typename F>
inline void each_vector(Long count, F f) {
  Long i = 0;
  for (; i + LANES <= count; i += LANES) f(widest{}, i);
  for (; i + 4 <= count; i += 4) f(vec4{}, i);
  for (; i < count; ++i) f(0.f, i);
}

// `count` floats copied, or set to zero, without a call: rows of images are short. The last vector overlaps.
inline void copy(const float* from, Long count, float* to) {
  Long i = 0;
  if (count >= LANES) {
    for (; i + LANES < count; i += LANES) store(to + i, load<widest>(from + i));
    store(to + count - LANES, load<widest>(from + count - LANES));
    return;
  }
  for (; i + 4 <= count; i += 4) store(to + i, load<vec4>(from + i));
  for (; i < count; ++i) to[i] = from[i];
}
inline void clear(float* to, Long count) {
  Long i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, widest{});
  for (; i + 4 <= count; i += 4) store(to + i, vec4{});
  for (; i < count; ++i) to[i] = 0;
}

template <typename one, typename vec>  // Σ of a vector's lanes, by halves
inline one all_lanes(vec value) {
  if constexpr (sizeof(vec) == sizeof(one)) return value[0];
  else {
    typedef one half __attribute__((vector_size(sizeof(vec) / 2)));
    half halves[2];
    std::memcpy(halves, &value, sizeof value);
    return all_lanes<one>(halves[0] + halves[1]);
  }
}

inline bool all_finite(const float* values, Long count) {
  vec8 sum[4] = {};
  Long i = 0;
  for (; i + 32 <= count; i += 32)
    for (int v = 0; v < 4; ++v) {
      vec8 value = load<vec8>(values + i + v * 8);
      sum[v] += value - value;  // zero, or NaN
    }
  sum[0] += sum[1] + (sum[2] + sum[3]);
  for (; i < count; ++i) sum[0][i % 8] += values[i] - values[i];
  for (int lane = 0; lane < 8; ++lane)
    if (sum[0][lane] != 0) return false;
  return true;
}

enum Place { WEIGHTS, BLOCKS, SUMS, WINDOW, INPUTS, OUTPUTS, IN_ROWS, OUT_ROWS, DY_ROWS, FREQUENCIES, RISING, RISING_ROWS, TO_ROWS, PLANES, PIXELS_OF_PLANES };

// `count` values at one place of the calling thread's own, kept from call to call: fresh pages cost more than most layers.
template <typename T, Place place>
inline T* scratch(size_t count) {
  static thread_local std::unique_ptr<T[]> kept;
  static thread_local size_t size = 0;
#ifdef POISON  // for tools/sanitize.py: never larger than asked for, and full of NaN
  kept.reset(new T[count]), size = count;
  std::memset(static_cast<void*>(kept.get()), 0xff, count * sizeof(T));
#endif
  if (size < count) kept.reset(), kept.reset(new T[count]), size = count;
  return kept.get();
}
