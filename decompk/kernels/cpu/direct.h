// The direct convolutions of K members on a CPU: fprop, dgrad, wgrad in float32; x (K, N, H, W, C), w (K, O, kh, kw, C).
//
// A row of the kernel, kw taps times C channels, lies in memory as the same row of any pixel's surroundings does. So a
// convolution is a sum over kernel rows of plain products whose operands are read where they lie. Where the padding
// comes in, a few rows of the image are copied, with zeros around them, into a buffer that stays in cache.
#pragma once

#include "planar.h"

namespace {

constexpr int TARGET = 240;  // pixels of a unit

struct Nothing {
  void operator()(size_t, const Unit&) const {}
};

// weights: of every member [outputs in blocks][taps][C][block]; then(i, unit) when a unit's outputs are written
template <typename Then = Nothing>
inline void run(const Job& j, int K, int N, const std::vector<Unit>& units, const float* weights, const float* bias,
                Then then = {}) {
  Long taps = Long(j.taps_h) * j.taps_w * j.C;
  bool planar_too = is_planar(j.O, j.taps_h * j.taps_w) && j.stride_h * j.stride_w * j.step_h * j.step_w == 1;
  std::vector<char> exact(K, true);  // whether padding multiplied by a member's weights adds what is nothing
  if (j.padded())
#pragma omp parallel for
    for (int k = 0; k < K; ++k) {
      const float* weight = weights + k * taps * j.O;
      exact[k] = all_finite(weight, taps * j.O) || (all_nan(weight, taps * j.O) && all_meet(j));
    }
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < units.size(); ++i) {
    const Unit& u = units[i];
    const float *weight = weights + u.k * taps * j.O, *start = bias ? bias + Long(u.k) * j.O : nullptr;
    if (planar_too) {
      Surroundings around(j, u, N, false);
      if (!around.inside && !exact[u.k]) tap_by_tap(j, u, N, weight, start);
      else
        planar(around, u.images, j.C, j.taps_h, j.taps_w, weight, start, j.O, u.rows, j.columns, [&](int image, int h) {
          return j.dst + ((Long(u.k) * N + u.n + image) * j.dst_H + u.row + h) * j.dst_W * j.O;
        });
    } else {
      Pixels p(j, u, N);
      if (!p.inside && !exact[u.k]) tap_by_tap(j, u, N, weight, start);
      else
        for (int o = 0, width; o < j.O; o += width) {
          width = width_of(j.O - o);
          tiles(p.in, 0, p.step, j.taps_h, j.taps_w * j.C, weight + taps * o, start ? start + o : nullptr, p.out, o, p.count, width);
        }
    }
    then(i, u);
  }
}

// dx of dy and w. Every phase of the stride is a convolution of its own, without zeros.
inline void input_gradient(const Shape& s, const float* dy, const float* w, float* dx) {
  for (int a = 0; a < s.stride_h; ++a)
    for (int b = 0; b < s.stride_w; ++b) {
      int first_h = (a + s.pad_h) % s.stride_h, first_w = (b + s.pad_w) % s.stride_w;  // the first tap that lands here
      int taps_h = first_h < s.kh ? (s.kh - first_h - 1) / s.stride_h + 1 : 0;
      int taps_w = first_w < s.kw ? (s.kw - first_w - 1) / s.stride_w + 1 : 0;
      int rows = (s.H - a + s.stride_h - 1) / s.stride_h, columns = (s.W - b + s.stride_w - 1) / s.stride_w;
      if (rows <= 0 || columns <= 0) continue;
      if (!taps_h || !taps_w) taps_h = taps_w = 0;  // nothing lands here: zeros
      auto weights = backward_blocks<WEIGHTS>(s, w, first_h, first_w, taps_h, taps_w);
      int pad_h = taps_h - 1 - (a + s.pad_h - first_h) / s.stride_h;
      int pad_w = taps_w - 1 - (b + s.pad_w - first_w) / s.stride_w;
      run({dy, s.rows, s.columns, s.O, dx, s.H, s.W, s.C, s.stride_h, s.stride_w, a, b, rows, columns,
           taps_h, taps_w, 1, 1, pad_h, pad_w},
          s.K, s.N, units_of(s.K, s.N, rows, columns, TARGET), weights, nullptr);
    }
}

// How wgrad's pixels are cut: what a unit reads stays in L2.
inline std::vector<Unit> gradient_units(const Shape& s) {
  return units_of(s.K, s.N, s.rows, s.columns, std::clamp(32768 / (s.C + s.O), 64, 512));
}

// dw of x and dy. How the sums are cut does not depend on the number of threads.
inline void weight_gradient(const Shape& s, const float* x, const float* dy, float* dw) {
  Job j = forward_job(s, x, const_cast<float*>(dy));
  Long length = Long(s.kw) * s.C, size = Long(s.O) * s.kh * length;
  auto units = gradient_units(s);
  int parts = parts_of(s, int(units.size() / s.K));
  const float* sums = sums_of(s.K, units, parts, size, [&](const Unit& u, float* sum, Long) {
    Pixels p(j, u, s.N, true);
    outers(p.in, 0, p.step, s.kh, p.out, 0, p.count, sum, int(length), s.O);
  }, dw);
  add_parts(s.K, parts, sums, size, dw);
  mend_weights(s, x, dy, dw);
}

}  // namespace
