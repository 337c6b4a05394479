// prim.cuh on the host: every CUDA thread is a fiber, CTAs run in turn. What it is stricter about than a GPU: accesses
// outside the ranges that were allowed, unaligned ones, reads of copies still in flight and races between threads that
// no barrier orders all end the launch with an error. It sees neither the memory model nor the time anything takes.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#define DEVICE static inline
#define KERNEL(threads, blocks) static void
#define GRID_CONSTANT
#define UNROLL
#define NO_UNROLL

namespace emulation {

constexpr uint32_t SHARED_BASE = 1024, STACK_BYTES = 1 << 16;

struct Range {
  const char* begin;
  int64_t bytes;
  bool written;
};

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t size, bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool started, done;
  uint32_t warp_epoch;
  std::vector<Copy> copies;
};

struct Warp {
  int arrived = 0;
  const char* what = nullptr;
  uint32_t generation = 0, in[32][6], out[32][4];
};

// Who touched 4 bytes of shared memory last; -1: several.
struct Touch {
  uint32_t block_epoch = 0, warp_epoch = 0;
  int warp = -1, thread = -1;
};
struct Word {
  Touch write, read;
  bool in_flight = false;
};

struct Counts {
  int64_t matrices, bank_conflicts, products, bytes_read, bytes_written;
};

inline std::vector<Range> ranges;
inline std::vector<Fiber> fibers;  // number `threads` is the launch itself
inline std::vector<Warp> warps;
inline std::vector<char> shared;
inline std::vector<Word> words;
inline std::string error;
inline std::function<void()> body;
inline Counts counts;
inline int current, threads, block, member, blocks, type;
inline uint32_t waiting, barriers, block_epoch;
// What tests break on purpose: barriers that do not wait, and ranges shorter than their tensors.
inline bool without_barriers;
inline int64_t shortened;

inline void resume(int next) {
  const int self = current;
  if (next == self || _setjmp(fibers[self].at)) return;
  current = next;
  if (fibers[next].started) _longjmp(fibers[next].at, 1);
  fibers[next].started = true;
  setcontext(&fibers[next].start);
}

inline int next_alive() {
  for (int i = 1; i <= threads; i++) {
    const int next = (current + i) % threads;
    if (!fibers[next].done) return next;
  }
  return threads;
}

// Ends the launch: the other fibers are never resumed, and what their stacks own is lost.
[[noreturn]] inline void fail(const std::string& what) {
  error = "thread " + std::to_string(current) + " of CTA " + std::to_string(block) + ", member " +
          std::to_string(member) + ": " + what;
  current = threads;
  _longjmp(fibers[threads].at, 1);
}

inline void yield() {
  const int next = next_alive();
  if (next == current) fail("waits for threads that have ended");
  resume(next);
}

inline void run_fiber() {
  body();
  if (!fibers[current].copies.empty()) fail("a copy is in flight at the end");
  fibers[current].done = true;
  resume(next_alive());
}

inline void check_global(const void* at, int64_t bytes, int64_t alignment, bool write) {
  if ((uintptr_t)at % alignment) fail("unaligned global access");
  (write ? counts.bytes_written : counts.bytes_read) += bytes;
  for (const Range& r : ranges)
    if ((const char*)at >= r.begin && (const char*)at + bytes <= r.begin + r.bytes) {
      if (write && !r.written) fail("write to an input");
      return;
    }
  fail(write ? "global write out of bounds" : "global read out of bounds");
}

inline char* check_shared(uint32_t at, uint32_t bytes, bool write, bool landing = false) {
  if (at < SHARED_BASE || at + bytes > SHARED_BASE + shared.size()) fail("shared memory out of bounds");
  if (at % bytes) fail("unaligned shared access");
  const int warp = current / 32;
  const uint32_t warp_epoch = fibers[current].warp_epoch;
  const auto races = [&](const Touch& t) {
    if (t.block_epoch != block_epoch || t.thread == current) return false;
    return t.warp != warp || t.warp_epoch == warp_epoch;
  };
  for (uint32_t i = (at - SHARED_BASE) / 4; i < (at - SHARED_BASE + bytes) / 4; i++) {
    Word& word = words[i];
    if (word.in_flight && !landing) fail("shared memory is used while a copy to it is in flight");
    if (races(word.write)) fail("race: another thread wrote here since the last barrier");
    if (write) {
      if (races(word.read)) fail("race: another thread read here since the last barrier");
      word.write = {block_epoch, warp_epoch, warp, current};
    } else {
      Touch& t = word.read;
      const bool first = t.block_epoch != block_epoch;
      t = {block_epoch, warp_epoch, first || t.warp == warp ? warp : -1,
           first || t.thread == current ? current : -1};
    }
  }
  return shared.data() + (at - SHARED_BASE);
}

// The last lane to arrive computes for its warp.
template <class F> inline void together(const char* what, F compute) {
  Warp& w = warps[current / 32];
  if (w.arrived == 0) w.what = what;
  if (w.what != what) fail(std::string("a warp is divided between ") + w.what + " and " + what);
  if (++w.arrived == 32) {
    compute(w);
    w.arrived = 0;
    w.generation++;
  } else {
    for (const uint32_t generation = w.generation; w.generation == generation;) yield();
  }
}

inline float float_of_half(uint16_t v) {
  if (type == HALO_BF16) {
    const uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static const std::vector<float> table = [] {
    std::vector<float> t(1 << 16);
    for (uint32_t i = 0; i < t.size(); i++) {
      const uint16_t bits = i;
      _Float16 h;
      memcpy(&h, &bits, 2);
      t[i] = (float)h;
    }
    return t;
  }();
  return table[v];
}

inline uint16_t half_of_float(float f) {
  uint16_t v;
  if (type == HALO_BF16) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  const _Float16 h = (_Float16)f;
  memcpy(&v, &h, 2);
  return v;
}

inline void load_matrices(int number, uint32_t at, uint32_t* result) {
  const int lane = current % 32;
  Warp& mine = warps[current / 32];
  mine.in[lane][0] = at;
  if (lane < number * 8) check_shared(at, 16, false);
  together("load_matrix", [&](Warp& w) {
    for (int m = 0; m < number; m++) {
      int rows[8] = {}, most = 0;  // of each quarter of 4 banks
      for (int i = 0; i < 8; i++) {
        bool again = false;
        for (int before = 0; before < i; before++) again |= w.in[m * 8 + before][0] == w.in[m * 8 + i][0];
        const int here = again ? 0 : ++rows[w.in[m * 8 + i][0] >> 4 & 7];
        most = here > most ? here : most;
      }
      counts.matrices++;
      counts.bank_conflicts += most - 1;
      for (int l = 0; l < 32; l++)
        memcpy(&w.out[l][m], shared.data() + (w.in[m * 8 + l / 4][0] - SHARED_BASE) + l % 4 * 4, 4);
    }
  });
  memcpy(result, mine.out[lane], 4 * number);
}

// sum (16 × 8) += a (16 × DEPTH) · b (DEPTH × 8), in the lanes' registers as mma.sync has them.
template <int DEPTH> inline void multiply(float* sum, const uint32_t* a, const uint32_t* b) {
  constexpr int A = DEPTH / 4, B = DEPTH / 8;
  const int lane = current % 32;
  Warp& mine = warps[current / 32];
  memcpy(mine.in[lane], a, 4 * A);
  memcpy(mine.in[lane] + A, b, 4 * B);
  memcpy(mine.out[lane], sum, 16);
  together("multiply", [&](Warp& w) {
    float left[16][DEPTH], right[DEPTH][8];
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 2; e++) {
        const int k = l % 4 * 2 + e;
        const auto value = [&](int i) { return float_of_half(w.in[l][i] >> 16 * e); };
        for (int i = 0; i < A; i++) left[l / 4 + i % 2 * 8][k + i / 2 * 8] = value(i);
        for (int i = 0; i < B; i++) right[k + i * 8][l / 4] = value(A + i);
      }
    float result[16][8] = {};
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < DEPTH; k++)
        for (int j = 0; j < 8; j++) result[i][j] += left[i][k] * right[k][j];
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 4; e++) {
        float s;
        memcpy(&s, &w.out[l][e], 4);
        s += result[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
        memcpy(&w.out[l][e], &s, 4);
      }
    counts.products++;
  });
  memcpy(sum, mine.out[lane], 16);
}

// Runs `kernel` on a grid of `width` CTAs for each of `members`; null, or what went wrong.
inline const char* launch(int width, int members, int threads_, int shared_bytes, std::function<void()> kernel) {
  threads = threads_;
  blocks = width;
  body = kernel;
  error.clear();
  if ((int)fibers.size() <= threads) fibers = std::vector<Fiber>(threads + 1);
  for (int cta = 0; cta < width * members; cta++) {
    block = cta % width;
    member = cta / width;
    shared.assign(shared_bytes, '\xff');  // NaN
    words.assign(shared_bytes / 4, Word());
    warps.assign(threads / 32, Warp());
    waiting = barriers = 0;
    block_epoch = 1;
    for (int t = 0; t < threads; t++) {
      Fiber& f = fibers[t];
      if (!f.stack) f.stack.reset(new char[STACK_BYTES]);
      f.started = f.done = false;
      f.warp_epoch = 1;
      f.copies.clear();
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = STACK_BYTES;
      f.start.uc_link = nullptr;
      makecontext(&f.start, run_fiber, 0);
    }
    fibers[threads].started = true;
    current = threads;
    resume(0);
    if (!error.empty()) return error.c_str();
  }
  return nullptr;
}

inline void allow(const void* begin, int64_t bytes, bool written) {
  ranges.push_back({(const char*)begin, bytes - shortened, written});
}

}  // namespace emulation

DEVICE uint32_t shared_base() { return emulation::SHARED_BASE; }
DEVICE int thread_index() { return emulation::current; }
DEVICE int block_index() { return emulation::block; }
DEVICE int block_member() { return emulation::member; }
DEVICE int block_count() { return emulation::blocks; }

DEVICE void sync_block() {
  using namespace emulation;
  if (without_barriers) return;
  if (++waiting == (uint32_t)threads) {
    waiting = 0;
    barriers++;
    block_epoch++;
  } else {
    for (const uint32_t before = barriers; barriers == before;) yield();
  }
}
DEVICE void sync_warp() {
  using namespace emulation;
  together("sync_warp", [](Warp&) {});
  fibers[current].warp_epoch++;
}

static inline void start_copy(uint32_t to, const void* from, int size, int bytes) {
  using namespace emulation;
  if (bytes) check_global(from, bytes, size, false);
  check_shared(to, size, true);
  for (int i = 0; i < size / 4; i++) words[(to - SHARED_BASE) / 4 + i].in_flight = true;
  fibers[current].copies.push_back({to, from, (uint32_t)size, (uint32_t)bytes});
}
DEVICE void copy16(uint32_t to, const void* from, int bytes) { start_copy(to, from, 16, bytes); }
DEVICE void copy8(uint32_t to, const void* from, int bytes) { start_copy(to, from, 8, bytes); }
DEVICE void wait_copies() {
  using namespace emulation;
  for (const Copy& c : fibers[current].copies) {
    char* at = check_shared(c.to, c.size, true, true);
    memset(at, 0, c.size);
    memcpy(at, c.from, c.bytes);
    for (uint32_t i = 0; i < c.size / 4; i++) words[(c.to - SHARED_BASE) / 4 + i].in_flight = false;
  }
  fibers[current].copies.clear();
}

DEVICE void load_matrix(uint32_t at, uint32_t& a) { emulation::load_matrices(1, at, &a); }
DEVICE void load_matrix(uint32_t at, uint32_t& a, uint32_t& b) {
  uint32_t r[2];
  emulation::load_matrices(2, at, r);
  a = r[0], b = r[1];
}
DEVICE void load_matrix(uint32_t at, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  uint32_t r[4];
  emulation::load_matrices(4, at, r);
  a = r[0], b = r[1], c = r[2], d = r[3];
}
template <int TYPE> DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulation::multiply<16>(sum, a, b);
}
template <int TYPE> DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[2], uint32_t b) {
  emulation::multiply<8>(sum, a, &b);
}

template <int TYPE> DEVICE uint32_t pack(float low, float high) {
  return emulation::half_of_float(low) | (uint32_t)emulation::half_of_float(high) << 16;
}
template <int TYPE> DEVICE void unpack(uint32_t pair, float& low, float& high) {
  low = emulation::float_of_half(pair);
  high = emulation::float_of_half(pair >> 16);
}
DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
DEVICE float shuffle_xor(float value, int mask) {
  using namespace emulation;
  const int lane = current % 32;
  Warp& mine = warps[current / 32];
  mine.in[lane][0] = bits_of(value);
  together("shuffle_xor", [&](Warp& w) {
    for (int l = 0; l < 32; l++) w.out[l][0] = w.in[l ^ mask][0];
  });
  return float_of(mine.out[lane][0]);
}

DEVICE Vector4 load_shared16(uint32_t at) {
  Vector4 v;
  memcpy(&v, emulation::check_shared(at, 16, false), 16);
  return v;
}
DEVICE uint32_t load_shared4(uint32_t at) {
  uint32_t v;
  memcpy(&v, emulation::check_shared(at, 4, false), 4);
  return v;
}
DEVICE void store_shared16(uint32_t at, Vector4 v) { memcpy(emulation::check_shared(at, 16, true), &v, 16); }
DEVICE void store_shared4(uint32_t at, uint32_t v) { memcpy(emulation::check_shared(at, 4, true), &v, 4); }

template <class T> static inline T load_global(const void* from) {
  emulation::check_global(from, sizeof(T), sizeof(T), false);
  T v;
  memcpy(&v, from, sizeof(T));
  return v;
}
template <class T> static inline void store_global(void* to, T v) {
  emulation::check_global(to, sizeof(T), sizeof(T), true);
  memcpy(to, &v, sizeof(T));
}
DEVICE uint32_t load_pair(const uint16_t* from) { return load_global<uint32_t>(from); }
DEVICE uint32_t load_half(const uint16_t* from) { return load_global<uint16_t>(from); }
DEVICE float load_float(const float* from) { return load_global<float>(from); }
DEVICE void store_float(float* to, float v) { store_global(to, v); }
DEVICE void store16(uint16_t* to, Vector4 v) { store_global(to, v); }
DEVICE void store8(uint16_t* to, uint32_t x, uint32_t y) { store_global(to, x | (uint64_t)y << 32); }
DEVICE void store_half(uint16_t* to, uint32_t v) { store_global(to, (uint16_t)v); }
