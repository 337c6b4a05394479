// Batch norm of K members on a CPU, with a residual and ReLU: float32, x (K, rows, C), all other tensors (K, C).
#include "norm.h"

namespace {

template <Mask mask, bool training>
void backward(const Rows& r, Gradients t, float* dx, float* dweight, float* dbias, float* passes) {
  t.sum<mask>(r, dweight, dbias);
#pragma omp parallel
  {
    Repeated means, scales, biases, share, slope;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) {
      Long at = r.start(unit), first = r.member(unit) * r.C;
      const float *m = means.fill(r, t.mean + first), *a = scales.fill(r, t.scale + first), *b = biases.fill(r, t.bias + first);
      const float *level = share.fill(r, &t.shares[first]), *tilt = slope.fill(r, &t.slopes[first]);
      const float *dy = t.dy + at, *x = t.x + at, *decide = t.decides(mask) + at;
      float *to = dx + at, *g = passes ? passes + at : nullptr, last = t.last;
      each(r, r.count(unit), [=](auto kind, Long d, Long c) {
        using vec = decltype(kind);
        vec mid = load<vec>(m + c), slant = load<vec>(a + c);
        vec value = passed(mask, last, load<vec>(dy + d), decide + d, mid, slant, load<vec>(b + c));
        if (g) store(g + d, value);
        if constexpr (training) value = value - load<vec>(level + c) - (load<vec>(x + d) - mid) * load<vec>(tilt + c);
        store(to + d, value * slant);
      });
    }
  }
}

}  // namespace

extern "C" {

// y = relu((x − mean) · scale + bias + residual). saved (4, K, C): as Norm has it. weight, bias, the running statistics
// and residual may be null; training moves the statistics, else they are used.
void batch_norm(const float* x, const float* weight, const float* bias, float* running_mean, float* running_var,
                const float* residual, float* y, float* saved, int training, int relu, double momentum, double eps,
                Long K, Long rows, Long C) {
  Rows r(K, rows, C);
  Moments moments(training ? r.units() : 0, C);
  if (training)
#pragma omp parallel
  {
    Repeated repeated;
#pragma omp for schedule(static)
    for (Long unit = 0; unit < r.units(); ++unit) moments.take(r, unit, x + r.start(unit), r.count(unit), repeated);
  }
  Norm{weight, bias, running_mean, running_var, saved, momentum, eps}.settle(r, training ? &moments : nullptr);
  normalise(r, x, saved, residual, relu, y);
}

// dx, dweight, dbias and, unless it is null, g: dy as the ReLU lets it pass. y is null where there was no residual.
void batch_norm_backward(const float* dy, const float* x, const float* y, const float* saved, int training, int relu,
                         float* dx, float* dweight, float* dbias, float* g, Long K, Long rows, Long C) {
  auto run = training ? (!relu ? backward<EVERYWHERE, true> : y ? backward<FROM_Y, true> : backward<FROM_X, true>)
                      : (!relu ? backward<EVERYWHERE, false> : y ? backward<FROM_Y, false> : backward<FROM_X, false>);
  Rows r(K, rows, C);
  run(r, Gradients(r, dy, x, y, saved, relu), dx, dweight, dbias, g);
}

}  // extern "C"
