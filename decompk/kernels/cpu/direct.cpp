// Convolutions of K members on a CPU: fprop, dgrad, wgrad in float32; x (K, N, H, W, C), w (K, O, kh, kw, C).
#include "direct.h"

extern "C" {

// y (K, N, H', W', O) of x and w, bias (K, O) or null. O is a multiple of 4. sizes: as Shape has them.
void fprop(const float* x, const float* w, const float* bias, float* y, const Long* sizes) {
  Shape s(sizes);
  run(forward_job(s, x, y), s.K, s.N, units_of(s.K, s.N, s.rows, s.columns, TARGET), forward_blocks<WEIGHTS>(s, w), bias);
}

void dgrad(const float* dy, const float* w, float* dx, const Long* sizes) { input_gradient(Shape(sizes), dy, w, dx); }

void wgrad(const float* x, const float* dy, float* dw, const Long* sizes) { weight_gradient(Shape(sizes), x, dy, dw); }

}  // extern "C"
