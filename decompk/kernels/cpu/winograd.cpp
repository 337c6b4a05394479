// 3×3 convolutions of stride 1 by Winograd's F(2×2, 3×3): 16 products instead of 36 for every four pixels.
//
// A tile of 2×2 outputs needs 4×4 inputs. Input tiles d, kernels g and outputs y are mapped to 4×4 "frequencies":
//   D = Bᵀ d B,  U = G g Gᵀ,  y = Aᵀ (Σ_c U · D) A;   dU = Σ_tiles D · (A dy Aᵀ),  dg = Gᵀ dU G.
// Every number in B and A is 0, 1 or −1, in G also ½; so sums stay as exact as those of the direct form.
// C and O are multiples of 8.
#include "conv.h"

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

struct Shapes {  // of one side's activations, H × W pixels of C channels, and the other's
  int N, H, W, C, O, out_H, out_W, pad_h, pad_w;

  int rows() const { return (out_H + 1) / 2; }  // tiles of an image
  int columns() const { return (out_W + 1) / 2; }
};

// The tiles of a unit in rows of tiles. Both buffers hold [F][tiles, filled up][channels].
struct Tiles : Shapes {
  Unit u;
  size_t count, full;
  float *in, *out;
  const float** in_rows;
  float** out_rows;

  Tiles(const Shapes& shapes, const Unit& u)
      : Shapes(shapes), u(u), count(size_t(u.images) * u.rows * columns()), full(filled_up(count)) {
    in = scratch<float, INPUTS>(F * full * C), out = scratch<float, OUTPUTS>(F * full * O);
    in_rows = scratch<const float*, IN_ROWS>(full), out_rows = scratch<float*, OUT_ROWS>(full);
    for (size_t t = 0; t < full; ++t) in_rows[t] = in + t * C, out_rows[t] = out + t * O;
  }

  void read(const float* x) {  // in = Bᵀ d B
    Long wide = 2 * columns() + 2, tall = 2 * u.rows + 2;
    const float* image = x + (Long(u.k) * N + u.n) * H * W * C;
    const float* d = window(image, u.images, H, W, C, 2 * u.row - pad_h, -pad_w, tall, wide);
    size_t t = 0;
    for (int i = 0; i < u.images; ++i)
      for (int h = 0; h < u.rows; ++h)
        for (int w = 0; w < columns(); ++w, ++t)
          for (int c = 0; c < C; c += 8) {
            const float* at = d + ((i * tall + 2 * h) * wide + 2 * w) * C + c;
            vec8 from[4][4], to[4][4];
#pragma GCC unroll 4
            for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
              for (int b = 0; b < 4; ++b) from[a][b] = load<vec8>(at + (a * wide + b) * C);
            both(from, to, to_input<vec8>);
#pragma GCC unroll 4
            for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
              for (int b = 0; b < 4; ++b) store(&in[((a * 4 + b) * full + t) * C + c], to[a][b]);
          }
  }

  // body(tile, image, row, column) for every tile; the latter two of its first output pixel
  template <typename Body>
  void each(Body body) {
    size_t t = 0;
    for (int i = 0; i < u.images; ++i)
      for (int h = 0; h < u.rows; ++h)
        for (int w = 0; w < columns(); ++w, ++t) body(t, Long(u.k) * N + u.n + i, 2 * (u.row + h), 2 * w);
  }

  bool write(float* y, const float* bias) {  // y = Aᵀ out A + bias; whether it is finite
    vec8 sum = {};
    each([&](size_t t, Long image, int row, int column) {
      for (int o = 0; o < O; o += 8) {
        vec8 from[4][4], to[2][2];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) from[a][b] = load<vec8>(&out[((a * 4 + b) * full + t) * O + o]);
        both(from, to, to_output<vec8>);
        vec8 start = bias ? load<vec8>(bias + o) : vec8{};
        for (int a = 0; a < 2 && row + a < out_H; ++a)
          for (int b = 0; b < 2 && column + b < out_W; ++b)
            store(y + ((image * out_H + row + a) * out_W + column + b) * O + o, to[a][b] + start);
        sum += (to[0][0] + to[0][1]) + (to[1][0] + to[1][1]);
      }
    });
    return all_finite(reinterpret_cast<float*>(&sum), 8);
  }

  void read_gradient(const float* dy) {  // out = A dy Aᵀ
    each([&](size_t t, Long image, int row, int column) {
      for (int o = 0; o < O; o += 8) {
        vec8 from[2][2] = {}, to[4][4];
        for (int a = 0; a < 2 && row + a < out_H; ++a)
          for (int b = 0; b < 2 && column + b < out_W; ++b)
            from[a][b] = load<vec8>(dy + ((image * out_H + row + a) * out_W + column + b) * O + o);
        both(from, to, to_gradient<vec8>);
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) store(&out[((a * 4 + b) * full + t) * O + o], to[a][b]);
      }
    });
  }
};

int target_of(int channels) { return std::clamp(6144 / channels, 24, 96); }  // tiles: both buffers stay in L2

// U of every member, [F][outputs in blocks][C][block]; of 3×3 weights [outputs in blocks][3][3][C][block].
const float* frequencies(int K, int O, int C, const float* blocks) {
  float* weights = scratch<float, WEIGHTS>(size_t(K) * F * O * C);
#pragma omp parallel for collapse(2)
  for (int k = 0; k < K; ++k)
    for (int o = 0; o < O; o += 8) {
      int first = o / BLOCK * BLOCK;  // of the block that o is in
      while (first + width_of(O - first) <= o) first += width_of(O - first);
      int width = width_of(O - first);
      if (o > first) continue;  // done with its block
      Long size = Long(C) * width;
      const float* from = blocks + (Long(k) * O + first) * 9 * C;
      for (Long i = 0; i < size; i += 8) {
        vec8 g[3][3], half[4][3];
        for (int t = 0; t < 9; ++t) g[t / 3][t % 3] = load<vec8>(from + t * size + i);
        for (int b = 0; b < 3; ++b) {
          vec8 sum = g[0][b] + g[2][b];
          half[0][b] = g[0][b], half[1][b] = (sum + g[1][b]) * 0.5f, half[2][b] = (sum - g[1][b]) * 0.5f, half[3][b] = g[2][b];
        }
        for (int a = 0; a < 4; ++a) {
          vec8 sum = half[a][0] + half[a][2];
          vec8 row[4] = {half[a][0], (sum + half[a][1]) * 0.5f, (sum - half[a][1]) * 0.5f, half[a][2]};
          for (int b = 0; b < 4; ++b) store(weights + ((Long(k) * F + a * 4 + b) * O + first) * C + i, row[b]);
        }
      }
    }
  return weights;
}

// blocks: 3×3 weights [outputs in blocks][3][3][C][block] of every member
void run(const float* x, int K, const Shapes& s, const float* blocks, const float* bias, float* y) {
  const float* weights = frequencies(K, s.O, s.C, blocks);
  auto units = units_of(K, s.N, s.rows(), s.columns(), target_of(s.C + s.O));
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < units.size(); ++i) {
    Tiles t(s, units[i]);
    t.read(x);
    for (int f = 0; f < F; ++f)
      for (int o = 0, width; o < s.O; o += width) {
        width = width_of(s.O - o);
        const float* weight = weights + ((size_t(t.u.k) * F + f) * s.O + o) * s.C;
        tiles(t.in_rows, f * t.full * s.C, 0, 1, s.C, weight, nullptr, t.out_rows, f * t.full * s.O + o, t.count, width);
      }
    const float* start = bias ? bias + Long(t.u.k) * s.O : nullptr;
    if (t.write(y, start)) continue;
    const float* block = blocks + Long(t.u.k) * s.O * 9 * s.C;
    Job j{x, s.H, s.W, s.C, y, s.out_H, s.out_W, s.O, 1, 1, 0, 0, s.out_H, s.out_W, 3, 3, 1, 1, s.pad_h, s.pad_w};
    Unit pixels{t.u.k, t.u.n, t.u.images, 2 * t.u.row, std::min(2 * t.u.rows, s.out_H - 2 * t.u.row)};
    Long image = Long(s.H) * s.W * s.C, images = Long(t.u.k) * s.N + t.u.n;
    bool nan = all_nan(block, Long(s.O) * 9 * s.C) || all_nan(x + images * image, t.u.images * image);
    if (!nan || !all_meet(j)) tap_by_tap(j, pixels, s.N, block, start);
  }
}

}  // namespace

extern "C" {

void winograd_fprop(const float* x, const float* w, const float* bias, float* y, const Long* sizes) {
  Shape s(sizes);
  Shapes shapes{s.N, s.H, s.W, s.C, s.O, s.rows, s.columns, s.pad_h, s.pad_w};
  run(x, s.K, shapes, forward_blocks<BLOCKS>(s, w), bias, y);
}

void winograd_dgrad(const float* dy, const float* w, float* dx, const Long* sizes) {
  Shape s(sizes);
  Shapes shapes{s.N, s.rows, s.columns, s.O, s.C, s.H, s.W, 2 - s.pad_h, 2 - s.pad_w};
  run(dy, s.K, shapes, backward_blocks<BLOCKS>(s, w, 0, 0, 3, 3), nullptr, dx);
}

void winograd_wgrad(const float* x, const float* dy, float* dw, const Long* sizes) {
  Shape s(sizes);
  Shapes shapes{s.N, s.H, s.W, s.C, s.O, s.rows, s.columns, s.pad_h, s.pad_w};
  auto units = units_of(s.K, s.N, shapes.rows(), shapes.columns(), target_of(s.C + s.O));
  int parts = parts_of(s, int(units.size() / s.K));
  Long each = Long(s.O) * s.C, size = F * each;
  const float* sums = sums_of(s.K, units, parts, size, [&](const Unit& u, float* sum) {
    Tiles t(shapes, u);
    t.read(x);
    t.read_gradient(dy);
    for (int f = 0; f < F; ++f)
      outers(t.in_rows, f * t.full * s.C, t.out_rows, f * t.full * s.O, t.count, sum + f * each, s.C, s.C, s.O);
  });
#pragma omp parallel for collapse(2)
  for (int k = 0; k < s.K; ++k)
    for (int o = 0; o < s.O; ++o)
      for (int c = 0; c < s.C; ++c) {
        float u[4][4] = {}, half[3][4];
        for (int part = 0; part < parts; ++part)
          for (int f = 0; f < F; ++f) u[f / 4][f % 4] += sums[(k * parts + part) * size + (Long(f) * s.O + o) * s.C + c];
        for (int b = 0; b < 4; ++b) {
          float sum = (u[1][b] + u[2][b]) / 2, difference = (u[1][b] - u[2][b]) / 2;
          half[0][b] = u[0][b] + sum, half[1][b] = difference, half[2][b] = sum + u[3][b];
        }
        float* to = dw + (Long(k) * s.O + o) * 9 * s.C + c;
        for (int a = 0; a < 3; ++a) {
          const float* g = half[a];
          to[(a * 3) * s.C] = g[0] + (g[1] + g[2]) / 2;
          to[(a * 3 + 1) * s.C] = (g[1] - g[2]) / 2;
          to[(a * 3 + 2) * s.C] = (g[1] + g[2]) / 2 + g[3];
        }
      }
  mend_weights(s, x, dy, dw);
}

}  // extern "C"
