// 3×3 convolutions of stride 1 by Winograd's F(2×2, 3×3): 16 products instead of 36 for every four pixels.
//
// A tile of 2×2 outputs needs 4×4 inputs. Input tiles d, kernels g and outputs y are mapped to 4×4 "frequencies":
//   D = Bᵀ d B,  U = G g Gᵀ,  y = Aᵀ (Σ_c U · D) A;   dU = Σ_tiles D · (A dy Aᵀ),  dg = Gᵀ dU G.
// Every number in B and A is 0, 1 or −1, in G also ½; so sums stay as exact as those of the direct form.
// C and O are multiples of 8.
#pragma once

#include "direct.h"

namespace {

constexpr int F = 16;  // frequencies of a tile

// r[0..3] of v[0..3] (Bᵀ v), of v[0..1] (A v); r[0..1] of v[0..3] (Aᵀ v)
template <typename T>
inline void to_input(const T* v, T* r) {
  r[0] = v[0] - v[2], r[1] = v[1] + v[2], r[2] = v[2] - v[1], r[3] = v[1] - v[3];
}
template <typename T>
inline void to_gradient(const T* v, T* r) {
  r[0] = v[0], r[1] = v[0] + v[1], r[2] = v[0] - v[1], r[3] = -v[1];
}
template <typename T>
inline void to_output(const T* v, T* r) {
  r[0] = v[0] + v[1] + v[2], r[1] = v[1] - v[2] - v[3];
}

// `map` along both sides: from in[n][n] to out[m][m]
template <int n, int m, typename T, typename Map>
inline void both(const T (&in)[n][n], T (&out)[m][m], Map map) {
  T half[n][m];
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) map(in[i], half[i]);
#pragma GCC unroll 4
  for (int j = 0; j < m; ++j) {
    T column[n], found[m];
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) column[i] = half[i][j];
    map(column, found);
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) out[i][j] = found[i];
  }
}

// One side of a convolution: H × W pixels of C channels become out_H × out_W of O; or of its gradients.
struct Side {
  int N, H, W, C, O, out_H, out_W, pad_h, pad_w;

  int rows() const { return (out_H + 1) / 2; }  // of tiles
  int columns() const { return (out_W + 1) / 2; }
  int target() const { return std::clamp(12288 / (C + O), 24, 192); }  // tiles of a unit: what they fill stays in L2
  std::vector<Unit> units(int K) const { return units_of(K, N, rows(), columns(), target()); }
};

// Frequencies of a unit's tiles, [F][tiles, filled up][channels]; planes are apart by no multiple of a page, whose
// lines would drive each other out of the cache.
template <typename T, Place place, Place row_place>
struct Planes {
  size_t full, step;
  T *first, **rows;

  Planes(size_t full, int channels) : full(full), step(full * channels + 48) {
    first = scratch<std::remove_const_t<T>, place>(F * step + 3 * LANES);  // vectors may read behind the last row
    rows = const_cast<T**>(scratch<T*, row_place>(full));
    for (size_t t = 0; t < full; ++t) rows[t] = first + t * channels;
  }
};

// The tiles of a unit in rows of tiles.
struct Tiles : Side {
  Unit u;
  size_t count, full;
  Long wide, tall;  // of the window that they read

  Tiles(const Side& side, const Unit& u)
      : Side(side), u(u), count(size_t(u.images) * u.rows * columns()), full(filled_up(count)), wide(2 * columns() + 2),
        tall(2 * u.rows + 2) {}

  const float* window_of(const float* x) const {
    const float* image = x + (Long(u.k) * N + u.n) * H * W * C;
    return window(image, u.images, H, W, C, 2 * u.row - pad_h, -pad_w, tall, wide);
  }

  template <typename Body>  // body(tile, image of the unit, row and column of tiles)
  void each(Body body) const {
    size_t t = 0;
    for (int i = 0; i < u.images; ++i)
      for (int h = 0; h < u.rows; ++h)
        for (int w = 0; w < columns(); ++w, ++t) body(t, i, h, w);
  }

  template <typename vec>
  void read(const float* d, float* to, size_t step) const {  // Bᵀ d B of a window
    constexpr int lanes = sizeof(vec) / sizeof(float);
    each([&](size_t t, int i, int h, int w) {
      for (int c = 0; c < C; c += lanes) {
        const float* at = d + ((i * tall + 2 * h) * wide + 2 * w) * C + c;
        vec from[4][4], found[4][4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) from[a][b] = load<vec>(at + (a * wide + b) * C);
        both(from, found, to_input<vec>);
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) store(to + (a * 4 + b) * step + t * C + c, found[a][b]);
      }
    });
  }

  // A dy Aᵀ, where dy (images, rows, columns, O) of the unit lies in memory, zero where the last tiles reach over
  template <typename vec, typename At>
  void read_gradient(At at, float* to, size_t step) const {
    constexpr int lanes = sizeof(vec) / sizeof(float);
    each([&](size_t t, int i, int h, int w) {
      for (int o = 0; o < O; o += lanes) {
        vec from[2][2], found[4][4];
        for (int a = 0; a < 2; ++a)
          for (int b = 0; b < 2; ++b) {
            const float* pixel = at(i, 2 * h + a, 2 * w + b);
            from[a][b] = pixel ? load<vec>(pixel + o) : vec{};
          }
        both(from, found, to_gradient<vec>);
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) store(to + (a * 4 + b) * step + t * O + o, found[a][b]);
      }
    });
  }

  template <typename vec>
  bool write(const float* out, size_t step, float* y, const float* bias) const {  // y = Aᵀ out A + bias; is it finite?
    constexpr int lanes = sizeof(vec) / sizeof(float);
    vec sum = {};
    Long images = Long(u.k) * N + u.n;
    each([&](size_t t, int i, int h, int w) {
      int row = 2 * (u.row + h), column = 2 * w;
      for (int o = 0; o < O; o += lanes) {
        vec from[4][4], to[2][2];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) from[a][b] = load<vec>(out + (a * 4 + b) * step + t * O + o);
        both(from, to, to_output<vec>);
        vec start = bias ? load<vec>(bias + o) : vec{};
        for (int a = 0; a < 2 && row + a < out_H; ++a)
          for (int b = 0; b < 2 && column + b < out_W; ++b)
            store(y + (((images + i) * out_H + row + a) * out_W + column + b) * O + o, to[a][b] + start);
        sum += (to[0][0] + to[0][1]) + (to[1][0] + to[1][1]);
      }
    });
    return all_finite(reinterpret_cast<float*>(&sum), lanes);
  }

  // Of the window d: y = its convolution with a member's weights as frequencies; is it finite?
  bool convolve(const float* d, const float* weights, const float* bias, float* y) const {
    Planes<const float, INPUTS, IN_ROWS> in(full, C);
    Planes<float, OUTPUTS, OUT_ROWS> out(full, O);
    auto into = const_cast<float*>(in.first);
    C % LANES ? read<vec8>(d, into, in.step) : read<widest>(d, into, in.step);
    for (size_t t = count * C; t < full * C; ++t)
      for (int f = 0; f < F; ++f) into[f * in.step + t] = 0;
    for (int f = 0; f < F; ++f)
      for (int o = 0, width; o < O; o += width) {
        width = width_of(O - o);
        const float* weight = weights + (Long(o) * F + Long(f) * width) * C;
        tiles(in.rows, f * in.step, 0, 1, C, weight, nullptr, out.rows, f * out.step + o, count, width);
      }
    return O % LANES ? write<vec8>(out.first, out.step, y, bias) : write<widest>(out.first, out.step, y, bias);
  }

  // dU += Σ D · (A dy Aᵀ): of the window d of x, and of dy as `at` finds it; sum [F][O][C]
  template <typename At>
  void correlate(const float* d, At at, float* sum) const {
    Planes<const float, INPUTS, IN_ROWS> in(full, C);
    Planes<const float, OUTPUTS, DY_ROWS> dy(full, O);
    auto into = const_cast<float*>(in.first), to = const_cast<float*>(dy.first);
    C % LANES ? read<vec8>(d, into, in.step) : read<widest>(d, into, in.step);
    O % LANES ? read_gradient<vec8>(at, to, dy.step) : read_gradient<widest>(at, to, dy.step);
    for (int f = 0; f < F; ++f)
      outers(in.rows, f * in.step, 0, 1, dy.rows, f * dy.step, count, sum + f * Long(O) * C, C, O);
  }
};

// U of every member, [outputs in blocks][F][C][block]; of 3×3 weights [outputs in blocks][3][3][C][block].
inline const float* frequencies(int K, int O, int C, const float* blocks) {
  return in_blocks<FREQUENCIES>(K, O, Long(F) * C, [=](int k, int first, int width, float* to) {
    Long size = Long(C) * width, i = 0;
    const float* from = blocks + (Long(k) * O + first) * 9 * C;
    auto transform = [&](auto kind, Long i) {
      using vec = decltype(kind);
      vec g[3][3], half[4][3];
      for (int t = 0; t < 9; ++t) g[t / 3][t % 3] = load<vec>(from + t * size + i);
      for (int b = 0; b < 3; ++b) {
        vec sum = g[0][b] + g[2][b];
        half[0][b] = g[0][b], half[1][b] = (sum + g[1][b]) * 0.5f, half[2][b] = (sum - g[1][b]) * 0.5f, half[3][b] = g[2][b];
      }
      for (int a = 0; a < 4; ++a) {
        vec sum = half[a][0] + half[a][2];
        vec row[4] = {half[a][0], (sum + half[a][1]) * 0.5f, (sum - half[a][1]) * 0.5f, half[a][2]};
        for (int b = 0; b < 4; ++b) store(to + (a * 4 + b) * size + i, row[b]);
      }
    };
    for (; i + LANES <= size; i += LANES) transform(widest{}, i);
    for (; i < size; i += 8) transform(vec8{}, i);
  });
}

// dw (K, O, 3, 3, C) = Gᵀ dU G of the sums of a member's parts, F · O · C floats each
inline void from_frequencies(int K, int O, int C, int parts, const float* sums, float* dw) {
#pragma omp parallel for collapse(2)
  for (int k = 0; k < K; ++k)
    for (int o = 0; o < O; ++o)
      for (int c = 0; c < C; c += 8) {
        vec8 u[4][4] = {}, half[3][4];
        for (int part = 0; part < parts; ++part)
          for (int f = 0; f < F; ++f)
            u[f / 4][f % 4] += load<vec8>(sums + ((Long(k) * parts + part) * F + f) * O * C + o * C + c);
        for (int b = 0; b < 4; ++b) {
          vec8 sum = (u[1][b] + u[2][b]) * 0.5f, difference = (u[1][b] - u[2][b]) * 0.5f;
          half[0][b] = u[0][b] + sum, half[1][b] = difference, half[2][b] = sum + u[3][b];
        }
        float* to = dw + (Long(k) * O + o) * 9 * C + c;
        for (int a = 0; a < 3; ++a) {
          const vec8* g = half[a];
          store(to + (a * 3) * C, g[0] + (g[1] + g[2]) * 0.5f);
          store(to + (a * 3 + 1) * C, (g[1] - g[2]) * 0.5f);
          store(to + (a * 3 + 2) * C, (g[1] + g[2]) * 0.5f + g[3]);
        }
      }
}

// y of x; blocks: 3×3 weights [outputs in blocks][3][3][C][block] of every member; then(i, unit), in rows of pixels, when
// a unit's outputs are written
template <typename Then = Nothing>
inline void run_winograd(const float* x, int K, const Side& s, const std::vector<Unit>& units, const float* blocks,
                         const float* bias, float* y, Then then = {}) {
  const float* weights = frequencies(K, s.O, s.C, blocks);
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < units.size(); ++i) {
    Tiles t(s, units[i]);
    const Unit& u = t.u;
    Unit pixels{u.k, u.n, u.images, 2 * u.row, std::min(2 * u.rows, s.out_H - 2 * u.row)};
    const float* start = bias ? bias + Long(u.k) * s.O : nullptr;
    if (!t.convolve(t.window_of(x), weights + Long(u.k) * F * s.O * s.C, start, y)) {
      const float* block = blocks + Long(u.k) * s.O * 9 * s.C;
      Job j{x, s.H, s.W, s.C, y, s.out_H, s.out_W, s.O, 1, 1, 0, 0, s.out_H, s.out_W, 3, 3, 1, 1, s.pad_h, s.pad_w};
      Long image = Long(s.H) * s.W * s.C, images = Long(u.k) * s.N + u.n;
      bool nan = all_nan(block, Long(s.O) * 9 * s.C) || all_nan(x + images * image, u.images * image);
      if (!nan || !all_meet(j)) tap_by_tap(j, pixels, s.N, block, start);
    }
    then(i, pixels);
  }
}

inline Side forward_side(const Shape& s) { return {s.N, s.H, s.W, s.C, s.O, s.rows, s.columns, s.pad_h, s.pad_w}; }
inline Side backward_side(const Shape& s) {
  return {s.N, s.rows, s.columns, s.O, s.C, s.H, s.W, 2 - s.pad_h, 2 - s.pad_w};
}

}  // namespace
