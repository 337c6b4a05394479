// Convolutions channel by channel of K members on a CPU: x (K, N, H, W, C), w (K, C, kh, kw), y (K, N, H', W', C).
//
// No padding is computed: each row and each column of pixels knows its taps. So NaN and infinity stay where torch has them.
#pragma once

#include "rising.h"

namespace {

struct Tap {
  int at, tap;  // a row or column that is read, and the kernel's that it is multiplied by
};

// For every row (or column) of what is computed, the rows that it reads: fprop, or with `back` dgrad.
std::vector<std::vector<Tap>> taps_of(int count, int size, int taps, int stride, int pad, bool back) {
  std::vector<std::vector<Tap>> found(count);
  for (int i = 0; i < count; ++i)
    for (int tap = 0; tap < taps; ++tap) {
      int at = back ? i + pad - tap : i * stride + tap - pad;
      if (back && at % stride) continue;
      if (back) at /= stride;
      if (at >= 0 && at < size) found[i].push_back({at, tap});
    }
  return found;
}

// Pixels [from, until) of a row, all of whose columns of taps are read, from `at` · C on: R rows of 3 taps.
template <typename vec, int R>
void inside(const float* const* src, const float* const* weights, Long C, Long stride, bool back, vec first, float* dst,
            int count) {
  vec w[R][3];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int t = 0; t < 3; ++t) w[r][t] = load<vec>(weights[r] + (back ? 2 - t : t) * C);
  const float* at[R];
  for (int r = 0; r < R; ++r) at[r] = src[r];
  for (int v = 0; v < count; ++v, dst += C) {
    vec sum[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r, at[r - 1] += stride)
      sum[r] = load<vec>(at[r]) * w[r][0] + load<vec>(at[r] + C) * w[r][1] + load<vec>(at[r] + 2 * C) * w[r][2];
#pragma GCC unroll 3
    for (int r = 1; r < R; ++r) sum[0] += sum[r];
    store(dst, sum[0] + first);
  }
}

struct Columns {
  std::vector<std::vector<Tap>> taps;
  int from = 0, until = 0, step = 0;  // those of 3 taps that read columns side by side, `step` apart from one to the next

  Columns(std::vector<std::vector<Tap>> found, int kw, int stride, bool back) : taps(std::move(found)) {
    if (kw != 3 || (back && stride > 1)) return;
    auto full = [&](int v) { return taps[v].size() == 3; };
    int count = int(taps.size());
    while (from < count && !full(from)) ++from;
    for (until = from; until < count && full(until);) ++until;
    step = stride;
  }
};

template <typename vec>
void one_row(const float* src, int W, const float* w, int kw, const float* start, float* dst, Long C, Long c,
             const std::vector<Tap>& rows, const Columns& columns, bool back) {
  vec first = start ? load<vec>(start + c) : vec{};
  const float *from[3], *weights[3];
  bool fast = columns.until > columns.from && rows.size() <= 3 && !rows.empty();
  auto one = [&](size_t v) {
    vec sum = first;
    for (const Tap& row : rows)
      for (const Tap& column : columns.taps[v])
        sum += load<vec>(src + (Long(row.at) * W + column.at) * C + c) * load<vec>(w + (Long(row.tap) * kw + column.tap) * C + c);
    store(dst + v * C + c, sum);
  };
  int until = fast ? columns.from : int(columns.taps.size());
  for (int v = 0; v < until; ++v) one(v);
  if (!fast) return;
  int left = std::min(columns.taps[columns.from][0].at, columns.taps[columns.from][2].at);
  for (size_t r = 0; r < rows.size(); ++r) {
    from[r] = src + (Long(rows[r].at) * W + left) * C + c;
    weights[r] = w + Long(rows[r].tap) * kw * C + c;
  }
  auto run = rows.size() == 3 ? inside<vec, 3> : rows.size() == 2 ? inside<vec, 2> : inside<vec, 1>;
  run(from, weights, C, columns.step * C, back, first, dst + columns.from * C + c, columns.until - columns.from);
  for (size_t v = columns.until; v < columns.taps.size(); ++v) one(v);
}

// A row of `dst` from the image `src` (H, W, C) by a member's weights (kh, kw, C).
inline void one_row(const float* src, int W, const float* w, int kw, const float* start, float* dst, int C,
                    const std::vector<Tap>& rows, const Columns& columns, bool back) {
  each_vector(C, [&](auto kind, Long c) {
    one_row<decltype(kind)>(src, W, w, kw, start, dst, C, c, rows, columns, back);
  });
}

// Every member's weights (C, kh, kw) as (kh, kw, C).
inline const float* channels_inside(const Shape& s, const float* w) {
  int taps = s.kh * s.kw;
  float* to = scratch<float, BLOCKS>(Long(s.K) * taps * s.C);
  for (int k = 0; k < s.K; ++k)
    for (int c = 0; c < s.C; ++c)
      for (int t = 0; t < taps; ++t) to[(Long(k) * taps + t) * s.C + c] = w[(Long(k) * s.C + c) * taps + t];
  return to;
}

// sum (kh, kw, C) += of a row of dy, T taps of a kernel row at a time
template <typename vec, int T>
void add_products(const Shape& s, const float* x, const float* dy, float* sum, Long c, const std::vector<Tap>& rows) {
  Long C = s.C;
  for (const Tap& row : rows)
    for (int t = 0; t < s.kw; t += T) {
      const float* from = x + Long(row.at) * s.W * C + c;
      float* to = sum + (Long(row.tap) * s.kw + t) * C + c;
      vec total[T] = {}, other[T] = {};
      auto one = [&](int v, vec* into, bool checks) {
        vec g = load<vec>(dy + Long(v) * C + c);
        Long at = Long(v) * s.stride_w + t - s.pad_w;
#pragma GCC unroll 5
        for (int i = 0; i < T; ++i)
          if (!checks || (at + i >= 0 && at + i < s.W)) into[i] += g * load<vec>(from + (at + i) * C);
      };
      int first = std::clamp((s.pad_w - t + s.stride_w - 1) / s.stride_w, 0, s.columns);
      int last = std::clamp((s.W - T + s.pad_w - t) / s.stride_w + 1, first, s.columns), v = 0;
      if (s.W - T + s.pad_w - t < 0) last = first;
      for (; v < first; ++v) one(v, total, true);
      for (; v + 1 < last; v += 2) one(v, total, false), one(v + 1, other, false);
      for (; v < last; ++v) one(v, total, false);
      for (; v < s.columns; ++v) one(v, total, true);
      for (int i = 0; i < T; ++i) store(to + i * C, load<vec>(to + i * C) + (total[i] + other[i]));
    }
}

// then(i, unit) when a unit's outputs are written
template <typename Then>
void run_by_channel(const Shape& s, const float* x, const float* w, const float* bias, const std::vector<Unit>& units,
                    float* y, Then then) {
  const float* weights = channels_inside(s, w);
  auto rows = taps_of(s.rows, s.H, s.kh, s.stride_h, s.pad_h, false);
  Columns columns(taps_of(s.columns, s.W, s.kw, s.stride_w, s.pad_w, false), s.kw, s.stride_w, false);
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < units.size(); ++i) {
    const Unit& u = units[i];
    for (int image = u.n; image < u.n + u.images; ++image)
      for (int h = u.row; h < u.row + u.rows; ++h) {
        Long of = Long(u.k) * s.N + image;
        one_row(x + of * s.H * s.W * s.C, s.W, weights + Long(u.k) * s.kh * s.kw * s.C, s.kw, member(bias, u.k, s.C),
                y + (of * s.rows + h) * s.columns * s.C, s.C, rows[h], columns, false);
      }
    then(i, u);
  }
}

// dx unless it is null, dw, and without a norm dbias, image by image: of each the gradient of y is formed once.
inline void both_by_channel(const Shape& s, const Rising& rising, const float* x, const float* w, float* dx, float* dw,
                            float* dbias) {
  Long C = s.C, pixels = Long(s.rows) * s.columns, taps = Long(s.kh) * s.kw * C;
  auto rows = taps_of(s.rows, s.H, s.kh, s.stride_h, s.pad_h, false);
  auto back = taps_of(s.H, s.rows, s.kh, s.stride_h, s.pad_h, true);
  Columns columns(taps_of(s.W, s.columns, s.kw, s.stride_w, s.pad_w, true), s.kw, s.stride_w, true);
  const float* weights = channels_inside(s, w);
  auto units = units_of(s.K, s.N, 1, 1, 1);
  int parts = parts_of(s, int(units.size() / s.K));
  std::vector<float> biases(dbias ? s.K * parts * C : 0);
  const float* sums = sums_of(s.K, units, parts, taps, [&](const Unit& u, float* sum, Long of) {
    Long image = Long(u.k) * s.N + u.n;
    const float* own = x + image * s.H * s.W * C;
    float* d = scratch<float, RISING>(pixels * C);
    rising.row(u.k, image * pixels * C, pixels * C, true, d);
    for (int h = 0; h < s.rows; ++h) {
      const float* gradient = d + Long(h) * s.columns * C;
      each_vector(s.C, [&](auto kind, Long c) {
        using vec = decltype(kind);
        (s.kw % 3 ? s.kw % 5 ? add_products<vec, 1> : add_products<vec, 5> : add_products<vec, 3>)(s, own, gradient, sum, c, rows[h]);
        if (!dbias) return;
        float* bias = &biases[of * C + c];
        vec total = load<vec>(bias);
        for (int v = 0; v < s.columns; ++v) total += load<vec>(gradient + Long(v) * C + c);
        store(bias, total);
      });
    }
    for (int h = 0; dx && h < s.H; ++h)
      one_row(d, s.columns, weights + u.k * taps, s.kw, nullptr, dx + (image * s.H + h) * s.W * C, s.C, back[h], columns, true);
  });
  float* inside = scratch<float, BLOCKS>(s.K * taps);
  add_parts(s.K, parts, sums, taps, inside);
  for (Long k = 0; k < s.K; ++k)
    for (Long c = 0; c < C; ++c)
      for (Long t = 0; t < taps / C; ++t) dw[k * taps + c * (taps / C) + t] = inside[k * taps + t * C + c];
  if (dbias) add_parts(s.K, parts, biases.data(), C, dbias);
}

}  // namespace
