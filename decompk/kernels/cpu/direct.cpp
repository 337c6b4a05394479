// Convolutions of K members on a CPU: fprop, dgrad, wgrad in float32; x (K, N, H, W, C), w (K, O, kh, kw, C).
#include "direct.h"

extern "C" {

// sizes: as Shape has them.
void dgrad(const float* dy, const float* w, float* dx, const Long* sizes) { input_gradient(Shape(sizes), dy, w, dx); }

void wgrad(const float* x, const float* dy, float* dw, const Long* sizes) { weight_gradient(Shape(sizes), x, dy, dw); }

}  // extern "C"
