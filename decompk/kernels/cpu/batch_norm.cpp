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

// sums[s][c] = Σ over `count` rows of what term(kind, place in the data, place in its group, found) leaves in found[s],
// vectors of 8 or, for the rows that fill no group, single numbers.
template <typename vec, typename one, int S, typename F>
void add_up(const Rows& r, Long count, F term, double* const (&sums)[S]) {
  Long groups = count / r.merged;
  for (double* sum : sums) std::fill(sum, sum + r.C, 0.);
  for (Long b = 0; b < r.wide; b += 32) {
    double8 total[S][4] = {};
    for (Long first = 0; first < groups; first += 32) {  // so many are added up in their own precision
      vec sum[S][4] = {};
      for (Long g = first; g < std::min(first + 32, groups); ++g)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          vec found[S];
          term(vec8{}, g * r.wide + b + v * 8, b + v * 8, found);
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) sum[s][v] += found[s];
        }
      for (int s = 0; s < S; ++s)
        for (int v = 0; v < 4; ++v) total[s][v] += as<double8>(sum[s][v]);
    }
    Long c = b % r.C;
    for (int i = 0; i < 32; ++i, c = c + 1 < r.C ? c + 1 : 0)
      for (int s = 0; s < S; ++s) sums[s][c] += total[s][i / 8][i % 8];
  }
  for (Long i = 0; i < (count - groups * r.merged) * r.C; ++i) {
    one found[S];
    term(0.f, groups * r.wide + i, i, found);
    for (int s = 0; s < S; ++s) sums[s][i % r.C] += found[s];
  }
}

// `add_up` in single floats, and again in double where the last of the sums overflowed or is below `least` by underflow;
// not where NaN has come in, as it has everywhere once training has diverged.
template <int S, typename F>
void column_sums(const Rows& r, Long count, double least, F term, double* const (&sums)[S]) {
  add_up<vec8, float>(r, count, term, sums);
  for (Long c = 0; c < r.C; ++c) {
    double first = sums[0][c], last = std::abs(sums[S - 1][c]);
    if (first == first && (!(last < 1e37) || (last < least && first != 0)))
      return add_up<double8, double>(r, count, term, sums);
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

// mean and Σ(x − mean)², (K, C). A chunk's sums are those of differences from the mean of its first eighth, which is
// less than three deviations from its own: too near to cost digits.
void moments(const Rows& r, const float* x, double* mean, double* squares) {
  Long C = r.C;
  std::vector<float> origins(r.units() * C);
  std::vector<double> sums(r.units() * 2 * C);
#pragma omp parallel
  {
    Repeated repeated;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      const float* from = x + r.start(unit);
      Long count = r.count(unit), few = std::min(count, (count / 8 / r.merged + 1) * r.merged);
      double *sum = &sums[unit * 2 * C], *square = sum + C;
      float* origin = &origins[unit * C];
      column_sums<1>(r, few, 0, [=](auto kind, Long d, Long, auto* found) {
        found[0] = as<decltype(found[0] + found[0])>(load<decltype(kind)>(from + d));
      }, {sum});
      for (Long c = 0; c < C; ++c) {
        origin[c] = float(sum[c] / few);
        if (!std::isfinite(origin[c])) origin[c] = 0;  // differences from infinity are NaN, and so would the mean be
      }
      const float* around = repeated.fill(r, origin);
      column_sums<2>(r, count, 1e-30 * count, [=](auto kind, Long d, Long c, auto* found) {
        using vec = decltype(kind);
        found[0] = as<decltype(found[0] + found[0])>(load<vec>(from + d) - load<vec>(around + c));
        found[1] = found[0] * found[0];
      }, {sum, square});
    }
  }
  std::fill(mean, mean + r.K * C, 0.), std::fill(squares, squares + r.K * C, 0.);
  for (Long unit = 0; unit < r.units(); ++unit) {
    double n = r.count(unit), *m = mean + r.member(unit) * C;
    for (Long c = 0; c < C; ++c) m[c] += (origins[unit * C + c] * n + sums[unit * 2 * C + c]) / r.rows;
  }
  for (Long unit = 0; unit < r.units(); ++unit) {
    double n = r.count(unit), *m = mean + r.member(unit) * C, *s = squares + r.member(unit) * C;
    for (Long c = 0; c < C; ++c) {
      double away = sums[unit * 2 * C + c] / n, step = origins[unit * C + c] + away - m[c];
      s[c] += std::max(sums[unit * 2 * C + C + c] - n * away * away, 0.) + n * step * step;
    }
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
        if constexpr (relu) value = vec{} > value ? vec{} : value;  // NaN stays
        store(to + d, value);
      });
    }
  }
}

// Where the ReLU stops gradients, as torch's does: where y is at most zero (not NaN), FROM_Y, or, without a residual,
// where (x − mean) · scale + bias is, FROM_X.
enum Mask { EVERYWHERE, FROM_Y, FROM_X };

struct Gradients {
  const float *dy, *x, *y, *mean, *rstd, *scale, *bias;
  float *dx, *dweight, *dbias, *g;  // g: dy as the ReLU lets it pass, or null
};

template <Mask mask, bool training>
void backward(const Rows& r, const Gradients& t) {
  Long C = r.C;
  std::vector<double> sums(r.units() * 2 * C);
  std::vector<float> shares(r.K * C), slopes(r.K * C);
  auto passed = [](auto kind, const float* dy, const float* from, const float* m, const float* a, const float* b, Long d,
                   Long c) {
    using vec = decltype(kind);
    vec value = load<vec>(dy + d);
    if constexpr (mask == FROM_Y) value = load<vec>(from + d) <= 0 ? vec{} : value;
    if constexpr (mask == FROM_X)
      value = (load<vec>(from + d) - load<vec>(m + c)) * load<vec>(a + c) + load<vec>(b + c) <= 0 ? vec{} : value;
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
      column_sums<2>(r, r.count(unit), 0, [=](auto kind, Long d, Long c, auto* found) {
        using vec = decltype(kind);
        using sum = decltype(found[0] + found[0]);
        found[0] = as<sum>(passed(kind, dy, from, m, a, b, d, c));
        found[1] = found[0] * as<sum>(load<vec>(x + d) - load<vec>(m + c));
      }, {&sums[unit * 2 * C], &sums[unit * 2 * C + C]});
    }
  }
  std::vector<double> totals(r.K * 2 * C);
  for (Long unit = 0; unit < r.units(); ++unit)
    for (Long i = 0; i < 2 * C; ++i) totals[r.member(unit) * 2 * C + i] += sums[unit * 2 * C + i];
  for (Long at = 0; at < r.K * C; ++at) {
    double sum = totals[at / C * 2 * C + at % C], product = totals[at / C * 2 * C + C + at % C];
    t.dbias[at] = float(sum), t.dweight[at] = float(product * t.rstd[at]);
    // dx = scale · (g − Σg / n − (x − mean) · rstd² · Σg(x − mean) / n), in eval mode scale · g
    shares[at] = float(sum / r.rows), slopes[at] = float(product / r.rows * t.rstd[at] * t.rstd[at]);
  }
#pragma omp parallel
  {
    Repeated means, scales, biases, share, slope;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      Long at = r.start(unit), first = r.member(unit) * C;
      const float *m = means.fill(r, t.mean + first), *a = scales.fill(r, t.scale + first), *b = biases.fill(r, t.bias + first);
      const float *level = share.fill(r, &shares[first]), *tilt = slope.fill(r, &slopes[first]);
      const float *dy = t.dy + at, *x = t.x + at, *from = decides + at;
      float *dx = t.dx + at, *g = t.g ? t.g + at : nullptr;
      each(r, r.count(unit), [=](auto kind, Long d, Long c) {
        using vec = decltype(kind);
        vec value = passed(kind, dy, from, m, a, b, d, c);
        if (g) store(g + d, value);
        if constexpr (training)
          value = value - load<vec>(level + c) - (load<vec>(x + d) - load<vec>(m + c)) * load<vec>(tilt + c);
        store(dx + d, value * load<vec>(a + c));
      });
    }
  }
}

}  // namespace

extern "C" {

// y = relu((x − mean) · scale + bias + residual). saved (4, K, C): mean, rstd, scale = rstd · weight, and bias, which
// makes good what the mean lost in rounding.
// weight, bias, the running statistics and residual may be null; training moves the statistics, else they are used.
void batch_norm(const float* x, const float* weight, const float* bias, float* running_mean, float* running_var,
                const float* residual, float* y, float* saved, int training, int relu, double momentum, double eps,
                Long K, Long rows, Long C) {
  Rows r(K, rows, C);
  float *mean = saved, *rstd = mean + K * C, *scale = rstd + K * C, *level = scale + K * C;
  std::vector<double> means(K * C), squares(K * C);
  if (training) moments(r, x, means.data(), squares.data());
  for (Long at = 0; at < K * C; ++at) {
    double average = training ? means[at] : running_mean[at], variance = training ? squares[at] / rows : running_var[at];
    if (training && running_mean) {
      running_mean[at] = float((1 - momentum) * running_mean[at] + momentum * average);
      running_var[at] = float((1 - momentum) * running_var[at] + momentum * squares[at] / (rows - 1));
    }
    mean[at] = float(average);
    rstd[at] = float(1 / std::sqrt(variance + eps));
    scale[at] = weight ? rstd[at] * weight[at] : rstd[at];
    level[at] = float((bias ? bias[at] : 0) + (training && std::isfinite(scale[at]) ? (mean[at] - average) * scale[at] : 0));
  }
  auto run = relu ? (residual ? apply<true, true> : apply<true, false>)
                  : (residual ? apply<false, true> : apply<false, false>);
  run(r, x, mean, scale, level, residual, y);
}

// dx, dweight, dbias and, unless it is null, g: dy as the ReLU lets it pass. y is null where there was no residual.
void batch_norm_backward(const float* dy, const float* x, const float* y, const float* saved, int training, int relu,
                         float* dx, float* dweight, float* dbias, float* g, Long K, Long rows, Long C) {
  const float *mean = saved, *rstd = mean + K * C, *scale = rstd + K * C, *level = scale + K * C;
  auto run = training ? (!relu ? backward<EVERYWHERE, true> : y ? backward<FROM_Y, true> : backward<FROM_X, true>)
                      : (!relu ? backward<EVERYWHERE, false> : y ? backward<FROM_Y, false> : backward<FROM_X, false>);
  run(Rows(K, rows, C), {dy, x, y, mean, rstd, scale, level, dx, dweight, dbias, g});
}

}  // extern "C"
