// What batch norm reads and writes, with a residual and ReLU: float32, x (K, rows, C), all other tensors (K, C).
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

// Rows of C channels, merged into groups of `wide` floats, a multiple of 32: so a vector's lanes keep their channels.
// A member's rows are cut into chunks that stay in cache, whatever the number of threads.
struct Rows {
  Long K, rows, C, merged, wide, chunk, chunks, plane;  // plane: from one of `saved` to the next

  Rows(Long K, Long rows, Long C, Long members = 0) : K(K), rows(rows), C(C), plane((members ? members : K) * C) {
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

inline void repeat(const Rows& r, const float* of_channel, float* to) {  // one number a channel, to a group's width
  for (Long i = 0; i < r.wide; i += r.C) std::copy_n(of_channel, r.C, to + i);
}

struct Repeated {
  std::vector<float> values;

  const float* fill(const Rows& r, const float* of_channel) {
    values.resize(r.wide);
    repeat(r, of_channel, values.data());
    return values.data();
  }
};

// sums[s][c] = Σ over `count` rows of what term(kind, place in the data, place in its group, found) leaves in found[s],
// vectors or, for the rows that fill no group, single numbers.
template <typename vec, typename one, int S, typename F>
void add_up(const Rows& r, Long count, F term, double* const (&sums)[S]) {
  Long groups = count / r.merged;
  for (double* sum : sums) std::fill(sum, sum + r.C, 0.);
  constexpr int V = 32 / LANES;
  for (Long b = 0; b < r.wide; b += 32) {
    doubles total[S][V] = {};
    for (Long first = 0; first < groups; first += 32) {  // so many are added up in their own precision
      vec sum[S][V] = {};
      for (Long g = first; g < std::min(first + 32, groups); ++g)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          vec found[S];
          term(widest{}, g * r.wide + b + v * LANES, b + v * LANES, found);
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) sum[s][v] += found[s];
        }
      for (int s = 0; s < S; ++s)
        for (int v = 0; v < V; ++v) total[s][v] += as<doubles>(sum[s][v]);
    }
    Long c = b % r.C;
    for (int i = 0; i < 32; ++i, c = c + 1 < r.C ? c + 1 : 0)
      for (int s = 0; s < S; ++s) sums[s][c] += total[s][i / LANES][i % LANES];
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
  add_up<widest, float>(r, count, term, sums);
  for (Long c = 0; c < r.C; ++c) {
    double first = sums[0][c], last = std::abs(sums[S - 1][c]);
    if (first == first && (!(last < 1e37) || (last < least && first != 0)))
      return add_up<doubles, double>(r, count, term, sums);
  }
}

// body(kind, place in the data, place in its group) for `count` rows, by vectors, then by single floats.
template <typename F>
void each(const Rows& r, Long count, F body) {
  Long groups = count / r.merged;
  for (Long g = 0; g < groups; ++g)
    for (Long i = 0; i < r.wide; i += LANES) body(widest{}, g * r.wide + i, i);
  for (Long i = 0; i < (count - groups * r.merged) * r.C; ++i) body(0.f, groups * r.wide + i, i);
}

// Count, mean and Σ(x − mean)² of pieces of each member's rows: whoever writes a piece tells what is in it.
struct Moments {
  Long C;
  std::vector<Long> counts;
  std::vector<float> origins;
  std::vector<double> sums;

  Moments(Long pieces, Long C) : C(C), counts(pieces), origins(pieces * C), sums(pieces * 2 * C) {}

  // Sums of differences from the mean of the first eighth, which is less than three deviations from that of all: too
  // near to cost digits.
  void take(const Rows& r, Long piece, const float* from, Long count, Repeated& repeated) {
    double *sum = &sums[piece * 2 * C], *square = sum + C;
    float* origin = &origins[piece * C];
    Long few = std::min(count, (count / 8 / r.merged + 1) * r.merged);
    counts[piece] = count;
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

  // Of all pieces, the same number for every member: mean and squares (K, C).
  void merge(const Rows& r, double* mean, double* squares) const {
    Long pieces = counts.size(), each = pieces / r.K;
    std::fill(mean, mean + r.K * C, 0.), std::fill(squares, squares + r.K * C, 0.);
    for (Long i = 0; i < pieces; ++i) {
      double n = counts[i], *m = mean + i / each * C;
      for (Long c = 0; c < C; ++c) m[c] += (origins[i * C + c] * n + sums[i * 2 * C + c]) / r.rows;
    }
    for (Long i = 0; i < pieces; ++i) {
      double n = counts[i], *m = mean + i / each * C, *s = squares + i / each * C;
      for (Long c = 0; c < C; ++c) {
        double away = sums[i * 2 * C + c] / n, step = origins[i * C + c] + away - m[c];
        s[c] += std::max(sums[i * 2 * C + C + c] - n * away * away, 0.) + n * step * step;
      }
    }
  }
};

// What a batch norm has besides x, all (K, C) and all but saved (4, K, C) may be null: mean, rstd, scale = rstd ·
// weight, and bias, which makes good what the mean lost in rounding.
struct Norm {
  const float *weight, *bias;
  float *running_mean, *running_var, *saved;
  double momentum, eps;

  // By the batch's moments, which move the running statistics, or, where there are none, by these.
  void settle(const Rows& r, const Moments* moments) {
    Long all = r.K * r.C;
    float *mean = saved, *rstd = mean + r.plane, *scale = rstd + r.plane, *level = scale + r.plane;
    std::vector<double> means(all), squares(all);
    if (moments) moments->merge(r, means.data(), squares.data());
    for (Long at = 0; at < all; ++at) {
      double average = moments ? means[at] : running_mean[at], variance = moments ? squares[at] / r.rows : running_var[at];
      if (moments && running_mean) {
        running_mean[at] = float((1 - momentum) * running_mean[at] + momentum * average);
        running_var[at] = float((1 - momentum) * running_var[at] + momentum * squares[at] / (r.rows - 1));
      }
      mean[at] = float(average);
      rstd[at] = float(1 / std::sqrt(variance + eps));
      scale[at] = weight ? rstd[at] * weight[at] : rstd[at];
      level[at] = float((bias ? bias[at] : 0) + (moments && std::isfinite(scale[at]) ? (mean[at] - average) * scale[at] : 0));
    }
  }
};

// ReLU and those that stop at a number: `most` of ReLU6 is 6, of a ReLU infinity.
struct Activation {
  bool there;
  float most, last;  // the largest that comes out, and the largest that a gradient passes

  Activation(int code)  // 0: none; 1: ReLU; else what it stops at
      : there(code), most(code > 1 ? float(code) : HUGE_VALF), last(code > 1 ? std::nextafter(most, 0.f) : most) {}

  template <typename vec>
  vec operator()(vec value) const {  // NaN stays
    value = vec{} > value ? vec{} : value;
    vec top = most - vec{};
    return value > top ? top : value;
  }
};

template <bool acts, bool residual>
void apply(const Rows& r, const float* x, const float* mean, const float* scale, const float* bias, const float* other,
           Activation activation, float* y) {
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
        if constexpr (acts) value = activation(value);
        store(to + d, value);
      });
    }
  }
}

// y = (x − mean) · scale + bias, + residual unless it is null, past the activation if there is one
inline void normalise(const Rows& r, const float* x, const float* saved, const float* residual, Activation activation,
                      float* y) {
  const float *mean = saved, *scale = mean + 2 * r.plane, *bias = scale + r.plane;
  auto run = activation.there ? (residual ? apply<true, true> : apply<true, false>)
                              : (residual ? apply<false, true> : apply<false, false>);
  run(r, x, mean, scale, bias, residual, activation, y);
}

// Where the activation stops gradients, as torch's does: where y is at most zero (not NaN, of a ReLU) or more than `last`,
// FROM_Y, or, without a residual, where (x − mean) · scale + bias is, FROM_X.
enum Mask { EVERYWHERE, FROM_Y, FROM_X };

template <typename vec>
inline vec passed(Mask mask, float last, vec dy, const float* from, vec mean, vec scale, vec bias) {
  if (mask == EVERYWHERE) return dy;
  vec value = load<vec>(from);
  if (mask == FROM_X) value = (value - mean) * scale + bias;
  if (last == HUGE_VALF) return value <= 0 ? vec{} : dy;
  dy = value > 0 ? dy : vec{};  // not where it is NaN: so torch's, by vectors, has it of a ReLU6
  return value > last - vec{} ? vec{} : dy;
}

// The gradient behind a batch norm as a function of the one before it: dx = scale · (g − share − (x − mean) · slope),
// where g is dy as the activation lets it pass; in eval mode scale · g.
struct Gradients {
  const float *dy, *x, *y, *mean, *rstd, *scale, *bias;
  float last;  // of the activation
  std::vector<float> shares, slopes;

  Gradients(const Rows& r, const float* dy, const float* x, const float* y, const float* saved, Activation activation)
      : dy(dy), x(x), y(y), mean(saved), rstd(of(saved, 1, r)), scale(of(saved, 2, r)), bias(of(saved, 3, r)),
        last(activation.last), shares(r.K * r.C), slopes(r.K * r.C) {}

  static const float* of(const float* saved, Long i, const Rows& r) { return saved ? saved + i * r.plane : nullptr; }

  const float* decides(Mask mask) const { return mask == FROM_Y ? y : x; }

  // dweight and dbias, and with them shares and slopes
  template <Mask mask>
  void sum(const Rows& r, float* dweight, float* dbias) {
    Long C = r.C;
    std::vector<double> sums(r.units() * 2 * C);
#pragma omp parallel
    {
      Repeated means, scales, biases;
#pragma omp for schedule(static)
      for (Long unit = 0; unit < r.units(); ++unit) {
        Long at = r.start(unit), first = r.member(unit) * C;
        const float *m = means.fill(r, mean + first), *a = scales.fill(r, scale + first), *b = biases.fill(r, bias + first);
        const float *from = dy + at, *values = x + at, *decide = decides(mask) + at;
        column_sums<2>(r, r.count(unit), 0, [=, last = last](auto kind, Long d, Long c, auto* found) {
          using vec = decltype(kind);
          using sum = decltype(found[0] + found[0]);
          vec mid = load<vec>(m + c);
          found[0] = as<sum>(passed(mask, last, load<vec>(from + d), decide + d, mid, load<vec>(a + c), load<vec>(b + c)));
          found[1] = found[0] * as<sum>(load<vec>(values + d) - mid);
        }, {&sums[unit * 2 * C], &sums[unit * 2 * C + C]});
      }
    }
    std::vector<double> totals(r.K * 2 * C);
    for (Long unit = 0; unit < r.units(); ++unit)
      for (Long i = 0; i < 2 * C; ++i) totals[r.member(unit) * 2 * C + i] += sums[unit * 2 * C + i];
    for (Long at = 0; at < r.K * C; ++at) {
      double sum = totals[at / C * 2 * C + at % C], product = totals[at / C * 2 * C + C + at % C];
      dbias[at] = float(sum), dweight[at] = float(product * rstd[at]);
      shares[at] = float(sum / r.rows), slopes[at] = float(product / r.rows * rstd[at] * rstd[at]);
    }
  }
};

}  // namespace
