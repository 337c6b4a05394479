// Batch norm of K members on a CPU, with a residual and ReLU: float32, x (K, rows, C), all other tensors (K, C).
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

// Rows of C channels, merged into groups of `wide` floats, a multiple of 32: so a vector's lanes keep their channels.
// A member's rows are cut into chunks that stay in cache, whatever the number of threads.
struct Rows {
  Long K, rows, C, merged, wide, chunk, chunks;

  Rows(Long K, Long rows, Long C) : K(K), rows(rows), C(C) {
    merged = 32 / std::gcd(C, Long(32));
    wide = merged * C;
    chunk = std::max((1L << 14) / wide, 1L) * merged;
    chunks = (rows + chunk - 1) / chunk;
  }
  Long units() const { return K * chunks; }
  Long member(Long unit) const { return unit / chunks; }
  Long count(Long unit) const { return std::min(chunk, rows - unit % chunks * chunk); }
  Long start(Long unit) const { return (member(unit) * rows + unit % chunks * chunk) * C; }
};

// One number a channel, repeated to a group's width.
struct Repeated {
  std::vector<float> values;

  const float* fill(const Rows& r, const float* of_channel) {
    values.resize(r.wide);
    for (Long i = 0; i < r.wide; ++i) values[i] = of_channel[i % r.C];
    return values.data();
  }
};

// sums[s][c] = Σ over `count` rows of what term(kind, place in the data, place in its group, found) leaves in found[s].
template <int S, typename F>
void column_sums(const Rows& r, Long count, F term, float* const (&sums)[S]) {
  Long groups = count / r.merged;
  for (float* sum : sums) std::fill(sum, sum + r.C, 0.f);
  for (Long b = 0; b < r.wide; b += 32) {
    vec8 sum[S][4] = {};
    for (Long g = 0; g < groups; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        vec8 found[S];
        term(vec8{}, g * r.wide + b + v * 8, b + v * 8, found);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sum[s][v] += found[s];
      }
    for (int s = 0; s < S; ++s)
      for (int i = 0; i < 32; ++i) sums[s][(b + i) % r.C] += sum[s][i / 8][i % 8];
  }
  for (Long i = 0; i < (count - groups * r.merged) * r.C; ++i) {
    float found[S];
    term(0.f, groups * r.wide + i, i, found);
    for (int s = 0; s < S; ++s) sums[s][i % r.C] += found[s];
  }
}

// body(kind, place in the data, place in its group) for `count` rows, by vectors, then by single floats.
template <typename F>
void each(const Rows& r, Long count, F body) {
  Long groups = count / r.merged;
  for (Long g = 0; g < groups; ++g)
    for (Long i = 0; i < r.wide; i += 8) body(vec8{}, g * r.wide + i, i);
  for (Long i = 0; i < (count - groups * r.merged) * r.C; ++i) body(0.f, groups * r.wide + i, i);
}

// mean and Σ(x − mean)², (K, C)
void moments(const Rows& r, const float* x, float* mean, float* squares) {
  Long C = r.C;
  std::vector<float> means(r.units() * C), away(r.units() * C);
#pragma omp parallel
  {
    Repeated center;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      const float* from = x + r.start(unit);
      Long count = r.count(unit);
      float *m = &means[unit * C], *s = &away[unit * C];
      column_sums<1>(r, count, [=](auto kind, Long d, Long, auto* found) { found[0] = load<decltype(kind)>(from + d); }, {m});
      for (Long c = 0; c < C; ++c) m[c] /= count;
      const float* middle = center.fill(r, m);
      column_sums<1>(r, count, [=](auto kind, Long d, Long c, auto* found) {
        auto difference = load<decltype(kind)>(from + d) - load<decltype(kind)>(middle + c);
        found[0] = difference * difference;
      }, {s});
    }
  }
  for (Long at = 0; at < r.K * C; ++at) {
    double total = 0, middle = 0, sum = 0;
    for (Long i = 0; i < r.chunks; ++i) {  // Chan's rule
      Long unit = at / C * r.chunks + i;
      double n = r.count(unit), step = means[unit * C + at % C] - middle;
      total += n, middle += step * n / total;
      sum += away[unit * C + at % C] + step * step * n * (total - n) / total;
    }
    mean[at] = float(middle), squares[at] = float(sum);
  }
}

template <bool relu, bool residual>
void apply(const Rows& r, const float* x, const float* mean, const float* scale, const float* bias, const float* other,
           float* y) {
#pragma omp parallel
  {
    Repeated means, scales, biases;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      Long first = r.member(unit) * r.C;
      const float *m = means.fill(r, mean + first), *a = scales.fill(r, scale + first), *b = biases.fill(r, bias + first);
      const float *from = x + r.start(unit), *add = residual ? other + r.start(unit) : nullptr;
      float* to = y + r.start(unit);
      each(r, r.count(unit), [=](auto kind, Long d, Long c) {
        using vec = decltype(kind);
        vec value = (load<vec>(from + d) - load<vec>(m + c)) * load<vec>(a + c) + load<vec>(b + c);
        if constexpr (residual) value += load<vec>(add + d);
        if constexpr (relu) value = value > 0 ? value : vec{};
        store(to + d, value);
      });
    }
  }
}

// Where the ReLU lets gradients pass: where y is above zero or, without a residual, (x − mean) · scale + bias is.
enum Mask { EVERYWHERE, FROM_Y, FROM_X };

struct Gradients {
  const float *dy, *x, *y, *mean, *rstd, *scale, *bias;
  bool training;
  float *dx, *dweight, *dbias, *g;  // g: dy as the ReLU lets it pass, or null
};

template <Mask mask>
void backward(const Rows& r, const Gradients& t) {
  Long C = r.C;
  std::vector<float> sums(r.units() * 2 * C), slopes(r.K * C), offsets(r.K * C);
  auto passed = [](auto kind, const float* dy, const float* from, const float* m, const float* a, const float* b, Long d,
                   Long c) {
    using vec = decltype(kind);
    vec value = load<vec>(dy + d);
    if constexpr (mask == FROM_Y) value = load<vec>(from + d) > 0 ? value : vec{};
    if constexpr (mask == FROM_X)
      value = (load<vec>(from + d) - load<vec>(m + c)) * load<vec>(a + c) + load<vec>(b + c) > 0 ? value : vec{};
    return value;
  };
  const float* decides = mask == FROM_Y ? t.y : t.x;
#pragma omp parallel
  {
    Repeated means, scales, biases;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      Long at = r.start(unit), first = r.member(unit) * C;
      const float *m = means.fill(r, t.mean + first), *a = scales.fill(r, t.scale + first), *b = biases.fill(r, t.bias + first);
      const float *dy = t.dy + at, *x = t.x + at, *from = decides + at;
      column_sums<2>(r, r.count(unit), [=](auto kind, Long d, Long c, auto* found) {
        using vec = decltype(kind);
        found[0] = passed(kind, dy, from, m, a, b, d, c);
        found[1] = found[0] * (load<vec>(x + d) - load<vec>(m + c));
      }, {&sums[unit * 2 * C], &sums[unit * 2 * C + C]});
    }
  }
  for (Long at = 0; at < r.K * C; ++at) {
    double sum = 0, product = 0;
    for (Long i = 0; i < r.chunks; ++i) {
      const float* found = &sums[(at / C * r.chunks + i) * 2 * C + at % C];
      sum += found[0], product += found[C];
    }
    t.dbias[at] = float(sum), t.dweight[at] = float(product * t.rstd[at]);
    // dx = scale · (g − Σg / n − (x − mean) · rstd² · Σg(x − mean) / n)
    double share = t.training ? double(t.scale[at]) / r.rows : 0;
    offsets[at] = float(-share * sum), slopes[at] = float(-share * t.rstd[at] * t.rstd[at] * product);
  }
#pragma omp parallel
  {
    Repeated means, scales, biases, tilt, level;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      Long at = r.start(unit), first = r.member(unit) * C;
      const float *m = means.fill(r, t.mean + first), *a = scales.fill(r, t.scale + first), *b = biases.fill(r, t.bias + first);
      const float *slope = tilt.fill(r, &slopes[first]), *offset = level.fill(r, &offsets[first]);
      const float *dy = t.dy + at, *x = t.x + at, *from = decides + at;
      float *dx = t.dx + at, *g = t.g ? t.g + at : nullptr;
      each(r, r.count(unit), [=](auto kind, Long d, Long c) {
        using vec = decltype(kind);
        vec value = passed(kind, dy, from, m, a, b, d, c);
        if (g) store(g + d, value);
        vec away = load<vec>(x + d) - load<vec>(m + c);
        store(dx + d, value * load<vec>(a + c) + away * load<vec>(slope + c) + load<vec>(offset + c));
      });
    }
  }
}

}  // namespace

extern "C" {

// y = relu((x − mean) · scale + bias + residual). saved (4, K, C): mean, rstd, scale = rstd · weight, bias.
// weight, bias, the running statistics and residual may be null; training moves the statistics, else they are used.
void batch_norm(const float* x, const float* weight, const float* bias, float* running_mean, float* running_var,
                const float* residual, float* y, float* saved, int training, int relu, double momentum, double eps,
                Long K, Long rows, Long C) {
  Rows r(K, rows, C);
  float *mean = saved, *rstd = mean + K * C, *scale = rstd + K * C, *level = scale + K * C;
  if (training) moments(r, x, mean, rstd);
  for (Long at = 0; at < K * C; ++at) {
    double variance = training ? double(rstd[at]) / rows : running_var[at];
    if (!training) mean[at] = running_mean[at];
    if (training && running_mean) {
      running_mean[at] += float(momentum * (double(mean[at]) - running_mean[at]));
      running_var[at] += float(momentum * (double(rstd[at]) / (rows - 1) - running_var[at]));
    }
    rstd[at] = float(1 / std::sqrt(variance + eps));
    scale[at] = weight ? rstd[at] * weight[at] : rstd[at];
    level[at] = bias ? bias[at] : 0;
  }
  auto run = relu ? (residual ? apply<true, true> : apply<true, false>)
                  : (residual ? apply<false, true> : apply<false, false>);
  run(r, x, mean, scale, level, residual, y);
}

// dx, dweight, dbias and, unless it is null, g: dy as the ReLU lets it pass. y is null where there was no residual.
void batch_norm_backward(const float* dy, const float* x, const float* y, const float* saved, int training, int relu,
                         float* dx, float* dweight, float* dbias, float* g, Long K, Long rows, Long C) {
  const float *mean = saved, *rstd = mean + K * C, *scale = rstd + K * C, *level = scale + K * C;
  auto run = !relu ? backward<EVERYWHERE> : y ? backward<FROM_Y> : backward<FROM_X>;
  run(Rows(K, rows, C), {dy, x, y, mean, rstd, scale, level, bool(training), dx, dweight, dbias, g});
}

}  // extern "C"
