// Eight or four floats as one value, in GCC's and Clang's own notation: AVX, AVX-512 and NEON alike.
#pragma once

#include <cstring>
#include <memory>

using Long = long;
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

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

enum Place { WEIGHTS, BLOCKS, SUMS, WINDOW, INPUTS, OUTPUTS, IN_ROWS, OUT_ROWS };

// `count` values at one place of the calling thread's own, kept from call to call: fresh pages cost more than most layers.
template <typename T, Place place>
inline T* scratch(size_t count) {
  static thread_local std::unique_ptr<T[]> kept;
  static thread_local size_t size = 0;
  if (size < count) kept.reset(), kept.reset(new T[count]), size = count;
  return kept.get();
}
