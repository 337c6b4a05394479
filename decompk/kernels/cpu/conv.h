// What the convolutions share: shapes, how work is cut, windows of images, and the two products that fill registers.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <vector>

#include "functions.h"
#include "vectors.h"

inline thread_local int alone_with = -1;  // the member that this thread computes, in all functions of the library

namespace {

struct Shape {
  int K, N, C, O, H, W, kh, kw, stride_h, stride_w, pad_h, pad_w, rows, columns;  // rows, columns: of y
  int members;  // of all; K are those that are computed together
  int per_output;  // inputs of an output: all, or one

  explicit Shape(const Long* sizes, By by = DIRECT) {
    for (int* field : {&K, &N, &C, &O, &H, &W, &kh, &kw, &stride_h, &stride_w, &pad_h, &pad_w, &rows, &columns})
      *field = int(*sizes++);
    members = K, per_output = by == BY_CHANNEL ? 1 : C;
    if (by != BY_CHANNEL && kh * kw == 1 && stride_h * stride_w == 1 && !pad_h && !pad_w) {  // whose images are one, a column of all pixels
      H = rows = N * H * W;
      N = W = columns = 1;
    }
  }

  Long inputs() const { return Long(N) * H * W * C; }  // of a member
  Long outputs() const { return Long(N) * rows * columns * O; }
  Long weights() const { return Long(O) * kh * kw * per_output; }
};

// dst pixel (h · step_h + h0, w · step_w + w0) = Σ over taps of src pixel (h · stride_h + tap − pad_h, …) · weight
struct Job {
  const float* src;
  int H, W, C;
  float* dst;
  int dst_H, dst_W, O, step_h, step_w, h0, w0;
  int rows, columns;  // how many pixels of dst
  int taps_h, taps_w, stride_h, stride_w, pad_h, pad_w;

  bool padded() const {
    return pad_h > 0 || pad_w > 0 || (rows - 1) * stride_h + taps_h - pad_h > H ||
           (columns - 1) * stride_w + taps_w - pad_w > W;
  }
};

inline Job forward_job(const Shape& s, const float* x, float* y) {
  return {x, s.H, s.W, s.C, y, s.rows, s.columns, s.O, 1, 1, 0, 0, s.rows, s.columns,
          s.kh, s.kw, s.stride_h, s.stride_w, s.pad_h, s.pad_w};
}

// Each thread takes a member at a time, whose activations stay in its cache, and threads wait but once: f(k) for every
// member, with which the thread is then alone; or f(-1) for all of them where they do not share out evenly.
template <typename F>
void by_member(int K, F f) {
  int threads = omp_get_max_threads(), turns = (K + threads - 1) / threads;
  if (turns * threads * 10 > K * 11 || omp_in_parallel()) return f(-1);
#pragma omp parallel for schedule(dynamic)
  for (int k = 0; k < K; ++k) {
    alone_with = k;
    f(k);
    alone_with = -1;
  }
}

// f(k, shape) of the member that the calling thread is alone with, or of every member as above; or f(0, shape of all).
template <typename F>
void by_member(const Shape& s, F f) {
  auto of = [&](int k) {
    Shape one = s;
    if (k >= 0) one.K = 1;
    f(std::max(k, 0), one);
  };
  if (alone_with >= 0) of(alone_with);
  else by_member(s.K, of);
}

template <typename T>
T* member(T* of_all, Long k, Long size) {  // of a tensor, unless it is absent
  return of_all ? of_all + k * size : nullptr;
}

struct Unit {  // some images of a member, or some rows of one
  int k, n, images, row, rows;
};

// Units of about `target` pixels, the same number for every member.
inline std::vector<Unit> units_of(int K, int N, int rows, int columns, int target) {
  std::vector<Unit> units;
  int pixels = std::max(1, rows * columns);
  int images = std::max(1, target / pixels);
  int count = std::max(1, (pixels + target / 2) / target), band = std::max(1, (rows + count - 1) / count);
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; n += images)
      for (int row = 0; row < rows; row += images > 1 ? rows : band)
        units.push_back({k, n, std::min(images, N - n), row, std::min(images > 1 ? rows : band, rows - row)});
  return units;
}

// Into how many parts a member's units are cut for wgrad, each with sums of its own: never by the number of threads.
inline int parts_of(const Shape& s, int units) {
  Long pixels = Long(s.N) * s.rows * s.columns;
  return int(std::clamp(std::min(pixels / 512, 32L / s.members), 1L, Long(std::max(1, units))));
}

// Sums of `size` floats, [member][part], over a member's units: add(unit, sum, which of all) adds one. They are made
// in `to`, where that is given and each member has one part, else in room of their own.
template <typename Add>
float* sums_of(int K, const std::vector<Unit>& units, int parts, Long size, Add add, float* to = nullptr) {
  float* sums = to && parts == 1 ? to : scratch<float, SUMS>(K * parts * size);
  int of_member = int(units.size() / K);
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (int k = 0; k < K; ++k)
    for (int part = 0; part < parts; ++part) {
      Long of = k * parts + part;
      float* sum = sums + of * size;
      std::fill(sum, sum + size, 0.f);
      for (int i = of_member * part / parts; i < of_member * (part + 1) / parts; ++i) add(units[k * of_member + i], sum, of);
    }
  return sums;
}

// to[k] = Σ of a member's `parts` sums of `size` floats
inline void add_parts(int K, int parts, const float* sums, Long size, float* to) {
  if (sums == to) return;
#pragma omp parallel for collapse(2)
  for (int k = 0; k < K; ++k)
    for (Long i = 0; i < size; ++i) {
      float sum = 0;
      for (int part = 0; part < parts; ++part) sum += sums[(k * parts + part) * size + i];
      to[k * size + i] = sum;
    }
}

// `tall` rows of `wide` pixels of every image from (top, left) on, with zeros outside of it, without gaps.
inline const float* window(const float* image, int images, int H, int W, int C, Long top, Long left, Long tall, Long wide) {
  float* buffer = scratch<float, WINDOW>(images * tall * wide * C + 3 * LANES);  // vectors may read behind the last row
  float* to = buffer;
  Long begin = std::min(std::max(-left, 0L), wide), end = std::max(std::min(W - left, wide), begin);
  for (int i = 0; i < images; ++i)
    for (Long h = top; h < top + tall; ++h, to += wide * C) {
      bool empty = h < 0 || h >= H;
      Long from = empty ? wide : begin, until = empty ? wide : end;
      clear(to, from * C);
      if (from < until) copy(image + ((i * Long(H) + h) * W + left + from) * C, (until - from) * C, to + from * C);
      clear(to + until * C, (wide - until) * C);
    }
  return buffer;
}

// Outputs are computed in blocks of one or two of the widest vectors, of 8, or of what is left; PIXELS of them at once, or twice as
// many where a block is one vector of those: as many sums as registers hold.
constexpr int BLOCK = 2 * LANES, PIXELS = LANES == 16 ? 12 : 6;

inline int width_of(int left) {
  for (int width = BLOCK; width > 4; width /= 2)
    if (left >= width) return width;
  return left;
}
inline size_t filled_up(size_t count) { return (count + 2 * PIXELS - 1) / (2 * PIXELS) * (2 * PIXELS); }  // whole tiles

// Every member's weights in blocks of outputs, [block][taps][inputs][block's outputs]; `taps` counts both
// middle ones. fill(k, first output, how many, to) writes a block.
template <Place place, typename Fill>
const float* in_blocks(int K, int O, Long taps, Fill fill) {
  float* weights = scratch<float, place>(K * O * taps);
  std::vector<int> firsts;
  for (int o = 0; o < O; o += width_of(O - o)) firsts.push_back(o);
#pragma omp parallel for collapse(2)
  for (int k = 0; k < K; ++k)
    for (size_t block = 0; block < firsts.size(); ++block) {
      int first = firsts[block];
      fill(k, first, width_of(O - first), weights + (Long(k) * O + first) * taps);
    }
  return weights;
}

// For fprop: outputs are O, and w (K, O, kh, kw, C) is turned over.
template <Place place>
const float* forward_blocks(const Shape& s, const float* w) {
  Long taps = Long(s.kh) * s.kw * s.C;
  return in_blocks<place>(s.K, s.O, taps, [=](int k, int first, int width, float* to) {
    const float* from = w + (Long(k) * s.O + first) * taps;
    Long tap = 0;
    for (; width >= LANES && tap + LANES <= taps; tap += LANES)
      for (int i = 0; i < width; i += LANES) {
        widest square[LANES];
        for (int row = 0; row < LANES; ++row) square[row] = load<widest>(from + (i + row) * taps + tap);
        turn(square);
        for (int row = 0; row < LANES; ++row) store(to + (tap + row) * width + i, square[row]);
      }
    for (; tap < taps; ++tap)
      for (int i = 0; i < width; ++i) to[tap * width + i] = from[i * taps + tap];
  });
}

// For dgrad: outputs are C; of every tap from (row, column) on, in steps of the stride, the last one first.
template <Place place>
const float* backward_blocks(const Shape& s, const float* w, int row, int column, int taps_h, int taps_w) {
  return in_blocks<place>(s.K, s.C, Long(taps_h) * taps_w * s.O, [=](int k, int first, int width, float* to) {
    for (int r = taps_h - 1; r >= 0; --r)
      for (int t = taps_w - 1; t >= 0; --t)
        for (int o = 0; o < s.O; ++o, to += width) {
          Long tap = (Long(row) + r * s.stride_h) * s.kw + column + t * s.stride_w;
          std::copy_n(w + ((Long(k) * s.O + o) * s.kh * s.kw + tap) * s.C + first, width, to);
        }
  });
}

// What a unit's windows read: of every image `tall` rows of `wide` pixels, `step` floats apart. `inside`: none is padding.
struct Surroundings {
  bool inside;
  const float* start;
  Long tall, wide, step, image_step;

  // vectors: whether whole vectors of an input's pixel are read, which must not reach behind the image
  Surroundings(const Job& j, const Unit& u, int N, bool vectors) {
    tall = Long(u.rows - 1) * j.stride_h + j.taps_h, wide = Long(j.columns - 1) * j.stride_w + j.taps_w;
    Long top = Long(u.row) * j.stride_h - j.pad_h, left = -j.pad_w;
    inside = top >= 0 && top + tall <= j.H && left >= 0 && left + wide <= j.W;
    bool in_place = inside && (!vectors || j.C % LANES == 0);
    step = (in_place ? Long(j.W) : wide) * j.C;
    image_step = (in_place ? Long(j.H) : tall) * step;
    const float* image = j.src + (Long(u.k) * N + u.n) * j.H * j.W * j.C;
    start = in_place ? image + top * step + left * j.C : window(image, u.images, j.H, j.W, j.C, top, left, tall, wide);
  }
  Surroundings(const float* start, Long tall, Long wide, int C)
      : inside(false), start(start), tall(tall), wide(wide), step(wide * C), image_step(tall * step) {}
};

// The pixels of a unit: where the input of each starts and where its output is; `step` leads to the next tap row.
// Behind the `count` ones the last is repeated: what is computed twice is written twice.
struct Pixels : Surroundings {
  const float** in;
  float** out;  // null where dst is
  size_t count;

  Pixels(const Job& j, const Unit& u, int N, bool vectors = false)
      : Surroundings(j, u, N, vectors), count(size_t(u.images) * u.rows * j.columns) {
    float* result = j.dst ? j.dst + (((Long(u.k) * N + u.n) * j.dst_H + j.h0) * j.dst_W + j.w0) * j.O : nullptr;
    size_t full = filled_up(count), p = 0;
    in = scratch<const float*, IN_ROWS>(full), out = j.dst ? scratch<float*, OUT_ROWS>(full) : nullptr;
    for (int i = 0; i < u.images; ++i)
      for (int h = 0; h < u.rows; ++h) {
        const float* from = start + i * image_step + h * j.stride_h * step;
        float* to = out ? result + (Long(i) * j.dst_H + Long(u.row + h) * j.step_h) * j.dst_W * j.O : nullptr;
        Long in_step = Long(j.stride_w) * j.C, out_step = Long(j.step_w) * j.O;
        for (int w = 0; w < j.columns; ++w) in[p + w] = from + w * in_step;
        for (int w = 0; out && w < j.columns; ++w) out[p + w] = to + w * out_step;
        p += j.columns;
      }
    for (; p < full; ++p) {
      in[p] = in[p - 1];
      if (out) out[p] = out[p - 1];
    }
  }
};

// out[p][…] = start + Σ_row Σ_l in[p][row · step + l] · weight[row][l][…], for P pixels and V vectors of outputs; U of
// l at a time, which saves looking up where a pixel is
template <typename vec, int P, int V, int U>
inline void tile(const float* const* in, Long from, Long step, int rows, int length, const float* weight,
                 const float* start, float* const* out, Long to) {
  constexpr int lanes = sizeof(vec) / sizeof(float);
  vec sum[P][V];
#pragma GCC unroll 32
  for (int v = 0; v < V; ++v) {
    vec first = start ? load<vec>(start + v * lanes) : vec{};
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p) sum[p][v] = first;
  }
  for (int row = 0; row < rows; ++row) {
    Long at = from + row * step;
    int l = 0;
    for (; l + U <= length; l += U, at += U, weight += U * V * lanes) {
      vec w[U][V];
#pragma GCC unroll 32
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) w[u][v] = load<vec>(weight + (u * V + v) * lanes);
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) {
        const float* values = in[p] + at;
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u) {
          vec value = values[u] - vec{};
#pragma GCC unroll 32
          for (int v = 0; v < V; ++v) sum[p][v] += value * w[u][v];
        }
      }
    }
    for (; l < length; ++l, ++at, weight += V * lanes) {
      vec w[V];
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) w[v] = load<vec>(weight + v * lanes);
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) {
        vec value = in[p][at] - vec{};
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) sum[p][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) store(out[p] + to + v * lanes, sum[p][v]);
}

// `tile` for fewer outputs than make a vector, with which a number of them that is no multiple of 4 ends.
template <int O>
inline void narrow_tile(const float* const* in, Long from, Long step, int rows, int length, const float* weight,
                        const float* start, float* const* out, Long to) {
  constexpr int P = 3;
  for (int p = 0; p < PIXELS; p += P) {
    float sum[P][O];
    for (int i = 0; i < P; ++i)
      for (int o = 0; o < O; ++o) sum[i][o] = start ? start[o] : 0;
    const float* w = weight;
    for (int row = 0; row < rows; ++row)
      for (Long at = from + row * step, l = 0; l < length; ++l, w += O)
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
          for (int o = 0; o < O; ++o) sum[i][o] += in[p + i][at + l] * w[o];
    for (int i = 0; i < P; ++i) std::copy_n(sum[i], O, out[p + i] + to);
  }
}
template <int... o>
auto narrow_tiles(std::integer_sequence<int, o...>) {
  return std::array{narrow_tile<o + 1>...};
}

// `tile` for all of `count` pixels, which are followed by enough more, and `width` outputs.
inline void tiles(const float* const* in, Long from, Long step, int rows, int length, const float* weight,
                  const float* start, float* const* out, Long to, size_t count, int width) {
  auto one = width == BLOCK ? tile<widest, PIXELS, 2, 2> : width == LANES ? tile<widest, 2 * PIXELS, 1, 4>
             : width == 8 ? tile<vec8, PIXELS, 1, 4> : width == 4 ? tile<vec4, PIXELS, 1, 4>
             : narrow_tiles(std::make_integer_sequence<int, 7>())[width - 1];
  for (size_t p = 0, each = width == LANES ? 2 * PIXELS : PIXELS; p < count; p += each)
    one(in + p, from, step, rows, length, weight, start, out + p, to);
}

// dw[r][i][l] += Σ over pixels of dy[o + i] · x[r][l], for R outputs and V vectors, `length` floats, of H kernel rows
template <int R, int V, int H>
inline void outer(const float* const* x, Long from, Long step, const float* const* dy, Long o, size_t count, float* dw,
                  Long of_row, Long of_output, int length) {
  widest sum[H][R][V] = {};
  for (size_t p = 0; p < count; ++p) {
    const float *in = x[p] + from, *g = dy[p] + o;
    widest value[H][V];
#pragma GCC unroll 32
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) value[h][v] = load<widest>(in + h * step + v * LANES);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      widest each = g[i] - widest{};
#pragma GCC unroll 32
      for (int h = 0; h < H; ++h)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) sum[h][i][v] += each * value[h][v];
    }
  }
#pragma GCC unroll 32
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) {
        float* to = dw + h * of_row + i * of_output + v * LANES;
        if (length >= (v + 1) * LANES) store(to, load<widest>(to) + sum[h][i][v]);
        else
          for (int l = 0; l < length - v * LANES; ++l) to[l] += sum[h][i][v][l];
      }
}

// `outer` for R outputs and V vectors, and for as many kernel rows of `rows` at once as fit: few sums wait for each other.
constexpr int MOST = LANES == 16 ? 8 : 4, MOST_SUMS = 3 * MOST;  // outputs at once, and what registers hold
struct Outer {
  decltype(&outer<1, 1, 1>) run;
  int rows;

  template <int R, int V>
  static Outer of(int rows) {
    if constexpr (R * V * 5 <= MOST_SUMS)
      if (rows == 5) return {outer<R, V, 5>, 5};
    if constexpr (R * V * 3 <= MOST_SUMS)
      if (rows == 3) return {outer<R, V, 3>, 3};
    return {outer<R, V, 1>, 1};
  }
  template <int R>
  static Outer of(int V, int rows) {
    return V == 3 ? of<R, 3>(rows) : V == 2 ? of<R, 2>(rows) : of<R, 1>(rows);
  }
};

// `outer` for every output and kernel row: dw[o][row][l], of `length`; x's kernel rows begin at `from`, `step` apart.
inline void outers(const float* const* x, Long from, Long step, int rows, const float* const* dy, Long o, size_t count,
                   float* dw, int length, int outputs) {
  Long of_output = Long(rows) * length;
  for (int l = 0; l < length; l += 3 * LANES) {
    int left = std::min(3 * LANES, length - l), V = (left + LANES - 1) / LANES;
    for (int i = 0, R; i < outputs; i += R) {
      int more = outputs - i;
      R = more >= MOST ? MOST : more >= 4 ? 4 : more >= 2 ? 2 : 1;
      Outer outer = R == MOST ? Outer::of<MOST>(V, rows) : R == 4 ? Outer::of<4>(V, rows)
                    : R == 2  ? Outer::of<2>(V, rows) : Outer::of<1>(V, rows);
      for (int r = 0; r < rows; r += outer.rows)
        outer.run(x, from + r * step + l, step, dy, o + i, count, dw + i * of_output + r * length + l, length, of_output, left);
    }
  }
}

// ---- NaN and infinity -----------------------------------------------------------------------------------------------
// Zeros that stand for padding make NaN of infinite weights, Winograd's differences of infinite inputs: torch, which
// leaves padding out and multiplies directly, has none there. So where that can be, all is computed tap by tap; not so
// where an operand is NaN throughout, as all are once training has diverged: the result is NaN, whatever the order.

inline bool all_nan(const float* values, Long count) {
  return std::all_of(values, values + count, [](float value) { return value != value; });
}

// Whether every window along an axis of `size` reads something, and every tap is read by one.
inline bool all_meet(int windows, int taps, int stride, int pad, int size) {
  std::vector<char> met(windows + taps);
  for (int i = 0; i < windows; ++i)
    for (int tap = 0, at = i * stride - pad; tap < taps; ++tap, ++at)
      if (at >= 0 && at < size) met[i] = met[windows + tap] = true;
  return std::all_of(met.begin(), met.end(), [](char one) { return one; });
}
inline bool all_meet(const Job& j) {
  return all_meet(j.rows, j.taps_h, j.stride_h, j.pad_h, j.H) && all_meet(j.columns, j.taps_w, j.stride_w, j.pad_w, j.W);
}

template <typename F>  // f(pixel of src, pixel of dst, tap) for every tap of a unit's pixels that is no padding
inline void each_tap(const Job& j, const Unit& u, int N, F f) {
  for (int i = 0; i < u.images; ++i) {
    Long image = Long(u.k) * N + u.n + i;
    for (int h = u.row; h < u.row + u.rows; ++h)
      for (int w = 0; w < j.columns; ++w)
        for (int r = 0; r < j.taps_h; ++r)
          for (int t = 0; t < j.taps_w; ++t) {
            Long from_h = Long(h) * j.stride_h + r - j.pad_h, from_w = Long(w) * j.stride_w + t - j.pad_w;
            if (from_h < 0 || from_h >= j.H || from_w < 0 || from_w >= j.W) continue;
            Long to_h = Long(h) * j.step_h + j.h0, to_w = Long(w) * j.step_w + j.w0;
            f((image * j.H + from_h) * j.W + from_w, (image * j.dst_H + to_h) * j.dst_W + to_w, r * j.taps_w + t);
          }
  }
}

// A unit's outputs of `weight`, its member's in blocks, and `bias`, its member's or null.
inline void tap_by_tap(const Job& j, const Unit& u, int N, const float* weight, const float* bias) {
  Long taps = Long(j.taps_h) * j.taps_w;
  for (int i = 0; i < u.images; ++i)
    for (int h = u.row; h < u.row + u.rows; ++h)
      for (int w = 0; w < j.columns; ++w) {
        Long at = ((Long(u.k) * N + u.n + i) * j.dst_H + Long(h) * j.step_h + j.h0) * j.dst_W + Long(w) * j.step_w + j.w0;
        for (int o = 0; o < j.O; ++o) j.dst[at * j.O + o] = bias ? bias[o] : 0;
      }
  each_tap(j, u, N, [&](Long from, Long to, int tap) {
    const float* x = j.src + from * j.C;
    for (int o = 0, width; o < j.O; o += width) {
      width = width_of(j.O - o);
      const float* w = weight + (o * taps + Long(tap) * width) * j.C;
      float* y = j.dst + to * j.O + o;
      for (int c = 0; c < j.C; ++c)
        for (int i = 0; i < width; ++i) y[i] += x[c] * w[c * width + i];
    }
  });
}

// Whether every tap of every output meets a NaN in a member's dy (N, rows, columns, O): a pooling leaves zeros between.
inline bool nan_meets_all(const Job& j, int N, const float* dy) {
  auto meets = [&](int o, int r, int t) {
    for (int i = 0; i < N; ++i)
      for (int h = 0; h < j.rows; ++h)
        for (int w = 0; w < j.columns; ++w) {
          float value = dy[((Long(i) * j.rows + h) * j.columns + w) * j.O + o];
          int row = h * j.stride_h + r - j.pad_h, column = w * j.stride_w + t - j.pad_w;
          if (value != value && row >= 0 && row < j.H && column >= 0 && column < j.W) return true;
        }
    return false;
  };
  for (int o = 0; o < j.O; ++o)
    for (int r = 0; r < j.taps_h; ++r)
      for (int t = 0; t < j.taps_w; ++t)
        if (!meets(o, r, t)) return false;
  return true;
}

// dw (K, O, kh, kw, C) of the members where it is not finite.
inline void mend_weights(const Shape& s, const float* x, const float* dy, float* dw) {
  Job j = forward_job(s, x, nullptr);
  Long size = Long(s.O) * s.kh * s.kw * s.C, read = Long(s.N) * s.H * s.W * s.C, written = Long(s.N) * s.rows * s.columns * s.O;
#pragma omp parallel for
  for (int k = 0; k < s.K; ++k) {
    float* to = dw + k * size;
    if (all_finite(to, size)) continue;
    if ((all_nan(x + k * read, read) && all_meet(j)) || nan_meets_all(j, s.N, dy + k * written)) continue;
    std::vector<double> sums(size);
    each_tap(j, {k, 0, s.N, 0, s.rows}, s.N, [&](Long from, Long pixel, int tap) {
      for (int o = 0; o < s.O; ++o) {
        double* sum = &sums[(Long(o) * s.kh * s.kw + tap) * s.C];
        for (int c = 0; c < s.C; ++c) sum[c] += double(dy[pixel * s.O + o]) * x[from * s.C + c];
      }
    });
    std::copy(sums.begin(), sums.end(), to);
  }
}

}  // namespace
