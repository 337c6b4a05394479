// Convolutions channel by channel of K members on a CPU: x (K, N, H, W, C), w (K, kh, kw, C), y (K, N, H', W', C).
//
// No padding is computed: each row and each column of pixels knows its taps. So NaN and infinity stay where torch has them.
#include "conv.h"

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

// dst (K, N, rows, columns, C) of src (K, N, H, W, C)
void gather(const Shape& s, const float* src, int H, int W, const float* w, const float* bias, float* dst,
            const std::vector<std::vector<Tap>>& rows, const Columns& columns, bool back) {
  Long height = rows.size(), width = columns.taps.size(), C = s.C;
#pragma omp parallel for schedule(static)
  for (Long i = 0; i < Long(s.K) * s.N * height; ++i) {
    Long image = i / height, k = image / s.N;
    each_vector(s.C, [&](auto kind, Long c) {
      one_row<decltype(kind)>(src + image * H * W * C, W, w + k * s.kh * s.kw * C, s.kw, member(bias, k, C),
                              dst + i * width * C, C, c, rows[i % height], columns, back);
    });
  }
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

}  // namespace

extern "C" {

// bias (K, C) or null; sizes: as Shape has them, O = C.
void depthwise(const float* x, const float* w, const float* bias, float* y, const Long* sizes) {
  Shape s(sizes, false);
  gather(s, x, s.H, s.W, w, bias, y, taps_of(s.rows, s.H, s.kh, s.stride_h, s.pad_h, false),
         Columns(taps_of(s.columns, s.W, s.kw, s.stride_w, s.pad_w, false), s.kw, s.stride_w, false), false);
}

void depthwise_dgrad(const float* dy, const float* w, float* dx, const Long* sizes) {
  Shape s(sizes, false);
  gather(s, dy, s.rows, s.columns, w, nullptr, dx, taps_of(s.H, s.rows, s.kh, s.stride_h, s.pad_h, true),
         Columns(taps_of(s.W, s.columns, s.kw, s.stride_w, s.pad_w, true), s.kw, s.stride_w, true), true);
}

// dw (K, kh, kw, C) and, unless it is null, dbias (K, C). How the sums are cut does not depend on the threads.
void depthwise_wgrad(const float* x, const float* dy, float* dw, float* dbias, const Long* sizes) {
  Shape s(sizes, false);
  Long C = s.C, taps = Long(s.kh) * s.kw * C, size = taps + C;
  auto rows = taps_of(s.rows, s.H, s.kh, s.stride_h, s.pad_h, false);
  auto units = units_of(s.K, s.N, s.rows, s.columns, 512);
  int parts = parts_of(s, int(units.size() / s.K));
  const float* sums = sums_of(s.K, units, parts, size, [&](const Unit& u, float* sum) {
    for (int i = 0; i < u.images; ++i)
      for (int h = u.row; h < u.row + u.rows; ++h) {
        Long image = Long(u.k) * s.N + u.n + i;
        const float* gradient = dy + (image * s.rows + h) * s.columns * C;
        each_vector(s.C, [&](auto kind, Long c) {
          using vec = decltype(kind);
          (s.kw % 3 ? s.kw % 5 ? add_products<vec, 1> : add_products<vec, 5> : add_products<vec, 3>)(s, x + image * s.H * s.W * C, gradient, sum, c, rows[h]);
          vec total = load<vec>(sum + taps + c);
          for (int v = 0; v < s.columns; ++v) total += load<vec>(gradient + Long(v) * C + c);
          store(sum + taps + c, total);
        });
      }
  });
  add_parts(s.K, parts, sums, size, taps, dw);
  if (dbias) add_parts(s.K, parts, sums + taps, size, C, dbias);
}

}  // extern "C"
