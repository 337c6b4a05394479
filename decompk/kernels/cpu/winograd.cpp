// 3×3 convolutions of K members by Winograd's algorithm: fprop, dgrad, wgrad in float32, as direct.cpp has them.
#include "winograd.h"

extern "C" {

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
  const float* sums = sums_of(s.K, units, parts, size, [&](const Unit& u, float* sum) {
    Tiles t(side, u);
    const float* images = dy + (Long(u.k) * s.N + u.n) * s.rows * s.columns * s.O;
    auto at = [&](int i, int h, int w) {
      bool inside = 2 * u.row + h < s.rows && w < s.columns;
      return inside ? images + ((Long(i) * s.rows + 2 * u.row + h) * s.columns + w) * s.O : nullptr;
    };
    t.correlate(t.window_of(x), at, sum);
  });
  from_frequencies(s.K, s.O, s.C, parts, sums, size, dw);
  mend_weights(s, x, dy, dw);
}

}  // extern "C"
