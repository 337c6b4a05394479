// A convolution and what stands behind it, batch norm of the batch, residual and ReLU or ReLU6, of K members on a CPU,
// both ways.
//
// Forward the moments are taken of what is still in cache, so that the norm is one pass. Backward the gradient of the
// convolution's output is never written: dgrad and wgrad of a few rows form it from that of the layer's output.
#include "by_channel.h"
#include "winograd.h"

namespace {

// dx where it is wanted and y is as large as x, dw, and without a norm dbias, in one go over the pixels. Without dx, or
// where it is found later, `dy` is filled unless it is null. False where numbers are not finite: see conv.h.
bool both(const Shape& s, const Rising& rising, const float* x, const float* w, float* dx, float* dw, float* dbias,
          float* dy) {
  Job j = forward_job(s, x, nullptr);
  Long length = Long(s.kw) * s.C, size = Long(s.O) * s.kh * length;
  auto units = gradient_units(s);
  int parts = parts_of(s, int(units.size() / s.K));
  int halo_h = dx ? s.kh - 1 : 0, halo_w = dx ? s.kw - 1 : 0;  // rows and columns around those of the unit
  int top = dx ? s.kh - 1 - s.pad_h : 0, left = dx ? s.kw - 1 - s.pad_w : 0;  // of them on this side
  const float* weights = dx ? backward_blocks<WEIGHTS>(s, w, 0, 0, s.kh, s.kw) : nullptr;
  bool tiled = dx && !is_planar(s.C, s.kh * s.kw);
  std::vector<float> biases(dbias ? s.K * parts * s.O : 0);
  const float* sums = sums_of(s.K, units, parts, size, [&](const Unit& u, float* sum, Long of) {
    Pixels p(j, u, s.N, true);
    Long first = Long(u.k) * s.N + u.n, tall = u.rows + halo_h, wide = s.columns + halo_w, row = Long(s.columns) * s.O;
    float* d = dy ? dy + (first * s.rows + u.row) * row : scratch<float, RISING>(u.images * tall * wide * s.O);
    size_t full = filled_up(p.count), at = 0;
    auto from = scratch<const float*, RISING_ROWS>(2 * full), into = from + full;
    auto to = tiled ? scratch<float*, TO_ROWS>(full) : nullptr;
    bool gapless = tall == u.rows && wide == s.columns;
    if (gapless) rising.row(u.k, (first * s.rows + u.row) * row, p.count * s.O, true, d);
    for (; gapless && at < p.count; ++at) {
      into[at] = d + at * s.O;
      if (tiled) from[at] = into[at], to[at] = dx + ((first * s.H + u.row) * s.W + at) * s.C;
    }
    if (!gapless)
      rising.window(s, u, u.row, u.rows, top, left, tall, wide, d, [&](const float* pixels, int i, Long of) {
        Long away = (top * wide + left) * s.O;
        float* row_of_dx = tiled ? dx + ((first + i) * s.H + of) * s.W * s.C : nullptr;
        for (int w = 0; w < s.columns; ++w) into[at + w] = pixels + w * s.O;
        for (int w = 0; tiled && w < s.columns; ++w) from[at + w] = into[at + w] - away, to[at + w] = row_of_dx + w * s.C;
        at += s.columns;
      });
    outers(p.in, 0, p.step, s.kh, into, 0, p.count, sum, int(length), s.O);
    if (dbias)
      for (size_t i = 0; i < p.count; ++i)
        for (int o = 0; o < s.O; ++o) biases[of * s.O + o] += into[i][o];
    if (!dx) return;
    const float* weight = weights + Long(u.k) * s.C * s.kh * s.kw * s.O;
    if (!tiled) {
      planar({d, tall, wide, s.O}, u.images, s.O, s.kh, s.kw, weight, nullptr, s.C, u.rows, s.columns, [&](int i, int h) {
        return dx + ((first + i) * s.H + u.row + h) * s.W * s.C;
      });
      return;
    }
    for (; at < full; ++at) from[at] = from[at - 1], to[at] = to[at - 1];
    for (int c = 0, width; c < s.C; c += width) {
      width = width_of(s.C - c);
      tiles(from, 0, wide * s.O, s.kh, s.kw * s.O, weight + Long(c) * s.kh * s.kw * s.O, nullptr, to, c, p.count, width);
    }
  }, dw);
  add_parts(s.K, parts, sums, size, dw);
  if (dbias) add_parts(s.K, parts, biases.data(), s.O, dbias);
  return all_finite(dw, s.K * size) && (!dx || all_finite(w, s.K * size));
}

// `both` for 3×3 of stride 1 by Winograd's algorithm.
bool both_by_winograd(const Shape& s, const Rising& rising, const float* x, const float* w, float* dx, float* dw,
                      float* dbias) {
  Side forward = forward_side(s), backward = backward_side(s);
  Long size = Long(F) * s.O * s.C;
  auto units = forward.units(s.K);
  int parts = parts_of(s, int(units.size() / s.K));
  const float* weights = dx ? frequencies(s.K, s.C, s.O, backward_blocks<BLOCKS>(s, w, 0, 0, 3, 3)) : nullptr;
  std::vector<char> finite(units.size() / s.K * s.K, true);
  std::vector<float> biases(dbias ? s.K * parts * s.O : 0);
  const float* sums = sums_of(s.K, units, parts, size, [&](const Unit& u, float* sum, Long of) {
    Tiles t(forward, u), back(backward, u);
    Long top = backward.pad_h, left = backward.pad_w;
    float* d = scratch<float, RISING>(u.images * back.tall * back.wide * s.O);
    rising.window(s, u, 2 * u.row, 2 * u.rows, top, left, back.tall, back.wide, d, [&](const float* pixels, int, Long) {
      for (int w = 0; dbias && w < s.columns; ++w)
        for (int o = 0; o < s.O; ++o) biases[of * s.O + o] += pixels[w * s.O + o];
    });
    auto at = [&](int i, int h, int w) { return d + ((i * back.tall + top + h) * back.wide + left + w) * s.O; };
    t.correlate(t.window_of(x), at, sum);
    if (dx && !back.convolve(d, weights + u.k * size, nullptr, dx)) finite[&u - units.data()] = false;
  });
  from_frequencies(s.K, s.O, s.C, parts, sums, dw);
  if (dbias) add_parts(s.K, parts, biases.data(), s.O, dbias);
  return all_finite(dw, Long(s.K) * s.O * 9 * s.C) && std::all_of(finite.begin(), finite.end(), [](char one) { return one; });
}

void forward(const Shape& s, const float* x, const float* w, const float* bias, Norm norm, const float* residual, float* y,
             float* z, Activation activation, By by) {
  Rows r(s.K, Long(s.N) * s.rows * s.columns, s.O, s.members);
  Side side = forward_side(s);
  auto units = by == WINOGRAD ? side.units(s.K) : units_of(s.K, s.N, s.rows, s.columns, TARGET);
  auto start = [&](const Unit& u) { return y + ((Long(u.k) * s.N + u.n) * s.rows + u.row) * s.columns * s.O; };
  auto count = [&](const Unit& u) { return Long(u.images) * u.rows * s.columns; };
  auto convolve = [&](auto then) {
    if (by == BY_CHANNEL) return run_by_channel(s, x, w, bias, units, y, then);
    const float* blocks = forward_blocks<BLOCKS>(s, w);
    if (by == WINOGRAD) run_winograd(x, s.K, side, units, blocks, bias, y, then);
    else run(forward_job(s, x, y), s.K, s.N, units, blocks, bias, then);
  };
  if (!norm.saved) {
    convolve([&](size_t, const Unit& u) {
      float* values = start(u);
      const float* more = residual ? residual + (values - y) : nullptr;
      Long size = count(u) * s.O;
      for (Long i = 0; more && i < size; ++i) values[i] += more[i];
      for (Long i = 0; activation.there && i < size; ++i) values[i] = activation(values[i]);
    });
    return;
  }
  Moments moments(units.size(), s.O);
  convolve([&](size_t i, const Unit& u) {
    Repeated repeated;
    moments.take(r, i, start(u), count(u), repeated);
  });
  norm.settle(r, &moments);
  normalise(r, y, norm.saved, residual, activation, z);
}

struct Outputs {  // of a backward; what is not wanted is null
  float *dx, *dw, *dgamma, *dbeta, *g, *dy;
};

// False where some of several members are not finite: then each has to be computed by itself, as it is on its own thread.
bool backward(const Shape& s, const float* dz, const float* x, const float* w, const float* y, const float* z,
              const float* saved, Activation activation, const Outputs& to, By by) {
  Rows r(s.K, Long(s.N) * s.rows * s.columns, s.O, s.members);
  Gradients t(r, dz, y, z, saved, activation);
  Mask mask = !activation.there ? EVERYWHERE : z ? FROM_Y : FROM_X;
  auto sum = mask == FROM_Y ? &Gradients::sum<FROM_Y> : mask == FROM_X ? &Gradients::sum<FROM_X> : &Gradients::sum<EVERYWHERE>;
  if (saved) (t.*sum)(r, to.dgamma, to.dbeta);
  Rising rising(r, t, mask, saved, to.g);
  float *dy = to.dy, *dx = to.dx, *dbias = saved ? nullptr : to.dbeta;
  if (by == BY_CHANNEL) {
    both_by_channel(s, rising, x, w, dx, to.dw, dbias);
    return true;
  }
  if (by == WINOGRAD ? both_by_winograd(s, rising, x, w, dx, to.dw, dbias)
                     : both(s, rising, x, w, dy ? nullptr : dx, to.dw, dbias, dy)) {
    if (dy && dx) input_gradient(s, dy, w, dx);
    return true;
  }
  if (s.K > 1) return false;
  std::vector<float> room(dy ? 0 : r.K * r.rows * r.C);
  float* all = dy ? dy : room.data();
  rising.all(all);
  weight_gradient(s, x, all, to.dw);
  if (dx) input_gradient(s, all, w, dx);
  return true;
}

}  // namespace

extern "C" {

// z = relu(norm(y) + residual) of y = x ∗ w + bias. bias, gamma, beta, the running statistics, which move, and residual
// may be null. saved (4, K, O): as Norm has it, or null where there is no norm: then y is the result, and z null.
// relu: 0 none, 1 ReLU, 6 ReLU6; by: see functions.h.
void layer(const float* x, const float* w, const float* bias, const float* gamma, const float* beta, float* running_mean,
           float* running_var, const float* residual, float* y, float* z, float* saved, int relu, double momentum, double eps,
           int by, const Long* sizes) {
  by_member(Shape(sizes, By(by)), [&](int k, const Shape& s) {
    auto of = [&](auto vector) { return member(vector, k, s.O); };
    Long out = s.outputs();
    Norm norm{of(gamma), of(beta), of(running_mean), of(running_var), of(saved), momentum, eps};
    forward(s, x + k * s.inputs(), w + k * s.weights(), of(bias), norm, member(residual, k, out), y + k * out,
            member(z, k, out), relu, By(by));
  });
}

// Of dz: dx unless it is null, dw, dgamma, dbeta, and g, dz as the activation lets it pass, unless that is null. y: what
// the norm normalised; z: the result, where it decides what was let pass, or null. dy: room for the gradient of y where
// `both` cannot find dx, else null. Without a norm saved, dgamma and g are null, and dbeta is the bias's or null.
void layer_backward(const float* dz, const float* x, const float* w, const float* y, const float* z, const float* saved,
                    int relu, float* dx, float* dw, float* dgamma, float* dbeta, float* g, float* dy, int by,
                    const Long* sizes) {
  auto members = [&](int k, const Shape& s) {
    auto of = [&](auto vector) { return member(vector, k, s.O); };
    auto activation = [&](auto tensor) { return member(tensor, k, s.outputs()); };
    Outputs to{member(dx, k, s.inputs()), dw + k * s.weights(), of(dgamma), of(dbeta), activation(g), activation(dy)};
    return backward(s, dz + k * s.outputs(), x + k * s.inputs(), w + k * s.weights(), activation(y), activation(z), of(saved),
                    relu, to, By(by));
  };
  by_member(Shape(sizes, By(by)), [&](int k, const Shape& s) {
    if (members(k, s)) return;
    Shape one = s;
    one.K = 1;
    for (k = 0; k < s.K; ++k) members(k, one);
  });
}

// Passes by themselves. sizes: as Shape has them.
void dgrad(const float* dy, const float* w, float* dx, const Long* sizes) { input_gradient(Shape(sizes), dy, w, dx); }

void wgrad(const float* x, const float* dy, float* dw, const Long* sizes) { weight_gradient(Shape(sizes), x, dy, dw); }

void winograd_dgrad(const float* dy, const float* w, float* dx, const Long* sizes) {
  Shape s(sizes);
  Side side = backward_side(s);
  run_winograd(dy, s.K, side, side.units(s.K), backward_blocks<BLOCKS>(s, w, 0, 0, 3, 3), nullptr, dx);
}

void winograd_wgrad(const float* x, const float* dy, float* dw, const Long* sizes) {
  Shape s(sizes);
  Side side = forward_side(s);
  auto units = side.units(s.K);
  int parts = parts_of(s, int(units.size() / s.K));
  Long size = Long(F) * s.O * s.C;
  const float* sums = sums_of(s.K, units, parts, size, [&](const Unit& u, float* sum, Long) {
    Tiles t(side, u);
    const float* images = dy + (Long(u.k) * s.N + u.n) * s.rows * s.columns * s.O;
    auto at = [&](int i, int h, int w) {
      bool inside = 2 * u.row + h < s.rows && w < s.columns;
      return inside ? images + ((Long(i) * s.rows + 2 * u.row + h) * s.columns + w) * s.O : nullptr;
    };
    t.correlate(t.window_of(x), at, sum);
  });
  from_frequencies(s.K, s.O, s.C, parts, sums, dw);
  mend_weights(s, x, dy, dw);
}

}  // extern "C"
