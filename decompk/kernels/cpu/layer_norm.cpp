// Layer norm of K members on a CPU: float32, x (K, R, D), each of its rows by itself; weight and bias (K, D) or null.
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

// sums[s] = Σ over a row of what term(kind, place, found) leaves in found[s]
template <int S, typename F>
inline void add_up(Long D, F term, double (&sums)[S]) {
  constexpr int V = 4;
  std::fill(sums, sums + S, 0.);
  Long i = 0;
  auto one = [&](auto kind, auto* sum) {
    decltype(kind) found[S];
    term(kind, i, found);
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) sum[s] += found[s];
    i += sizeof kind / sizeof(float);
  };
  while (i + LANES <= D) {
    widest sum[V][S] = {};
    Long until = std::min(i + 64 * V * LANES, D);  // so many are added up in their own precision
    while (i + V * LANES <= until)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) one(widest{}, sum[v]);
    while (i + LANES <= until) one(widest{}, sum[0]);
    for (int s = 0; s < S; ++s) sums[s] += all_lanes<float>((sum[0][s] + sum[1][s]) + (sum[2][s] + sum[3][s]));
  }
  if (i == D) return;
  vec4 four[S] = {};
  float single[S] = {};
  while (i + 4 <= D) one(vec4{}, four);
  while (i < D) one(0.f, single);
  for (int s = 0; s < S; ++s) sums[s] += all_lanes<float>(four[s]) + single[s];
}

struct Row {
  float mean, rstd, shift;  // shift makes good what the mean lost in rounding

  Row() = default;
  Row(double average, double variance, double eps) {
    double r = 1 / std::sqrt(variance + eps);
    mean = float(average), rstd = float(r), shift = float((mean - average) * r);
  }

  static Row in_double(const float* x, Long D, double eps) {  // of values whose squares overflow in single
    double mean = 0, variance = 0;
    for (Long i = 0; i < D; ++i) mean += x[i] / double(D);
    for (Long i = 0; i < D; ++i) variance += (x[i] - mean) * (x[i] - mean) / D;
    return Row(mean, variance, eps);
  }

  template <typename vec>
  vec normalised(vec x) const {
    return (x - mean) * rstd + shift;
  }
};

constexpr int MANY = 8;  // rows at once: what each waits for, its sums and their roots, the others do not

// By sums of differences from a first mean, which lose no digits to a large one.
inline void moments(const float* x, int count, Long D, double eps, Row* rows) {
  double sum[MANY][1], away[MANY][2], share = 1. / D;
  float origin[MANY];
  for (int b = 0; b < count; ++b) {
    const float* from = x + b * D;
    add_up(D, [=](auto kind, Long i, auto* found) { found[0] = load<decltype(kind)>(from + i); }, sum[b]);
    origin[b] = float(sum[b][0] * share);
  }
  for (int b = 0; b < count; ++b) {
    const float *from = x + b * D, first = origin[b];
    add_up(D, [=](auto kind, Long i, auto* found) {
      found[0] = load<decltype(kind)>(from + i) - first;
      found[1] = found[0] * found[0];
    }, away[b]);
  }
  for (int b = 0; b < count; ++b) {
    double off = away[b][0] * share;
    rows[b] = Row(origin[b] + off, std::max(away[b][1] * share - off * off, 0.), eps);
    if (!std::isfinite(away[b][1]) && sum[b][0] == sum[b][0]) rows[b] = Row::in_double(x + b * D, D, eps);
  }
}

// A member's rows are cut into chunks that stay in cache, each with sums of its own, whatever the number of threads.
struct Rows {
  Long K, R, D, chunk, chunks;

  Rows(Long K, Long R, Long D)
      : K(K), R(R), D(D), chunk(std::clamp((1L << 13) / D, 32L, 512L) / MANY * MANY), chunks((R + chunk - 1) / chunk) {}
  Long units() const { return K * chunks; }
  Long member(Long unit) const { return unit / chunks; }
  Long start(Long unit) const { return member(unit) * R + unit % chunks * chunk; }
  Long end(Long unit) const { return std::min(start(unit) + chunk, (member(unit) + 1) * R); }
};

// weight or bias of every member; where there is none, what stands for it
struct Affine {
  const float* values;
  Long size;
  std::vector<float> instead;

  Affine(const float* values, Long D, float otherwise)
      : values(values), size(values ? D : 0), instead(values ? 0 : D, otherwise) {}
  const float* of(Long k) const { return values ? values + k * size : instead.data(); }
};

// `count` rows, B at a time: dx and, added to sums (2, D), Σ dy · normalised and Σ dy.
template <int B, bool input, bool affine>
inline void backward(const float* dy, const float* x, const float* weight, const Row* rows, Long D, float* dx,
                     float* sums) {
  float level[B], tilt[B];
  if constexpr (input)
    for (int b = 0; b < B; ++b) {
      double sum[2];
      Row row = rows[b];
      const float *g = dy + b * D, *from = x + b * D;
      add_up(D, [=](auto kind, Long i, auto* found) {
        using vec = decltype(kind);
        found[0] = load<vec>(g + i) * load<vec>(weight + i);
        found[1] = found[0] * row.normalised(load<vec>(from + i));
      }, sum);
      level[b] = float(sum[0] / D), tilt[b] = float(sum[1] / D);
    }
  each_vector(D, [&](auto kind, Long i) {
    using vec = decltype(kind);
    vec scale = load<vec>(weight + i), product{}, sum{};
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      vec g = load<vec>(dy + b * D + i), normalised = rows[b].normalised(load<vec>(x + b * D + i));
      if constexpr (input) store(dx + b * D + i, (g * scale - level[b] - normalised * tilt[b]) * rows[b].rstd);
      if constexpr (affine) product += g * normalised, sum += g;
    }
    if constexpr (affine) store(sums + i, load<vec>(sums + i) + product);
    if constexpr (affine) store(sums + D + i, load<vec>(sums + D + i) + sum);
  });
}

template <bool input, bool affine>
void backward(const Rows& r, const float* dy, const float* x, const Affine& weight, const float* saved, float* dx,
              float* dweight, float* dbias) {
  Long all = r.K * r.R, D = r.D;
  float* sums = affine ? scratch<float, SUMS>(r.units() * 2 * D) : nullptr;
#pragma omp parallel if (r.units() > 1)
  {
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      float* sum = affine ? sums + unit * 2 * D : nullptr;
      if constexpr (affine) std::fill(sum, sum + 2 * D, 0.f);
      const float* scale = weight.of(r.member(unit));
      for (Long row = r.start(unit), count; row < r.end(unit); row += count) {
        count = row + MANY <= r.end(unit) ? MANY : 1;
        Row rows[MANY];
        for (int b = 0; b < count; ++b)
          rows[b].mean = saved[row + b], rows[b].rstd = saved[all + row + b], rows[b].shift = saved[2 * all + row + b];
        auto run = count == MANY ? backward<MANY, input, affine> : backward<1, input, affine>;
        run(dy + row * D, x + row * D, scale, rows, D, input ? dx + row * D : nullptr, sum);
      }
    }
    if constexpr (affine) {
      constexpr Long wide = 64;
      Long blocks = (2 * D + wide - 1) / wide;
#pragma omp for schedule(static)
      for (Long i = 0; i < r.K * blocks; ++i) {
        Long k = i / blocks, first = i % blocks * wide, width = std::min(wide, 2 * D - first);
        double total[wide] = {};
        for (Long chunk = 0; chunk < r.chunks; ++chunk) {
          const float* sum = sums + (k * r.chunks + chunk) * 2 * D + first;
          for (Long c = 0; c < width; ++c) total[c] += sum[c];
        }
        for (Long c = 0; c < width; ++c) {
          float* to = first + c < D ? dweight : dbias;
          if (to) to[k * D + (first + c) % D] = float(total[c]);
        }
      }
    }
  }
}

}  // namespace

extern "C" {

// y = (x − mean) · rstd · weight + bias. saved (3, K, R): as Row has it.
void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* saved, double eps, Long K,
                Long R, Long D) {
  Rows r(K, R, D);
  Affine weights(weight, D, 1), biases(bias, D, 0);
#pragma omp parallel for schedule(static) if (r.units() > 1)
  for (Long unit = 0; unit < r.units(); ++unit) {
    const float *scale = weights.of(r.member(unit)), *level = biases.of(r.member(unit));
    for (Long at = r.start(unit); at < r.end(unit); at += MANY) {
      int count = int(std::min(r.end(unit) - at, Long(MANY)));
      Row rows[MANY];
      moments(x + at * D, count, D, eps, rows);
      for (int b = 0; b < count; ++b) {
        Row row = rows[b];
        float *to = y + (at + b) * D, *kept = saved + at + b;
        const float* from = x + (at + b) * D;
        kept[0] = row.mean, kept[K * R] = row.rstd, kept[2 * K * R] = row.shift;
        each_vector(D, [=](auto kind, Long i) {
          using vec = decltype(kind);
          store(to + i, row.normalised(load<vec>(from + i)) * load<vec>(scale + i) + load<vec>(level + i));
        });
      }
    }
  }
}

// Whatever is not null of dx, dweight and dbias; weight as the forward had it.
void layer_norm_backward(const float* dy, const float* x, const float* weight, const float* saved, float* dx,
                         float* dweight, float* dbias, Long K, Long R, Long D) {
  bool affine = dweight || dbias;
  auto run = !dx ? backward<false, true> : affine ? backward<true, true> : backward<true, false>;
  if (dx || affine) run(Rows(K, R, D), dy, x, Affine(weight, D, 1), saved, dx, dweight, dbias);
}

}  // extern "C"
