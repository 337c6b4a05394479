// decompk::halo_conv2d, whose schema decompk/kernels/extension.py defines: checks tensors, fills in HaloParams, launches.
// Only torch's stable ABI, so that one binary serves every torch from 2.11 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "halo.h"
#ifdef HALO_EMULATION
#include "prim.cuh"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using Maybe = std::optional<Tensor>;

void check_shape(const Tensor& t, const std::vector<int64_t>& shape, const Tensor& x, const char* name) {
  bool right = t.dim() == (int64_t)shape.size();
  for (size_t i = 0; right && i < shape.size(); i++) right = t.size(i) == shape[i];
  STD_TORCH_CHECK(right, "halo_conv2d: ", name, " has the wrong shape");
  STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(),
                  "halo_conv2d: ", name, " is on another device than x");
}

// (K, N, H, W, C) with adjacent channels; its strides, and the widest access in bytes that it allows.
int check_activation(const Tensor& t, const std::vector<int64_t>& shape, const Tensor& x, const char* name,
                     int64_t (&strides)[4]) {
  check_shape(t, shape, x, name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "halo_conv2d: ", name, " is of another type than x");
  STD_TORCH_CHECK(t.size(4) == 1 || t.stride(4) == 1, "halo_conv2d: the channels of ", name, " are not adjacent");
  uint64_t all = (uint64_t)t.data_ptr() | (uint64_t)(t.size(4) * 2);
  for (int i = 0; i < 4; i++) {
    strides[i] = t.size(i) == 1 ? 0 : t.stride(i);
    all |= (uint64_t)(strides[i] * 2);
  }
  return all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 2;
}

void check_dense(const Tensor& t, const std::vector<int64_t>& shape, const Tensor& x, const char* name) {
  check_shape(t, shape, x, name);
  STD_TORCH_CHECK(t.is_contiguous(), "halo_conv2d: ", name, " is not contiguous");
}

const float* floats(const Maybe& t, int64_t rows, int64_t columns, const Tensor& x, const char* name) {
  if (!t) return nullptr;
  check_dense(*t, {rows, columns}, x, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "halo_conv2d: ", name, " is not float32");
  return (const float*)t->data_ptr();
}

#ifdef HALO_EMULATION
void allow(const Tensor& t, bool written) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  emulation::allow(t.data_ptr(), (last + 1) * size, written);
}
#endif

void halo_conv2d(Tensor x, Tensor weight, Tensor y, Maybe bias, Maybe scale, Maybe shift, Maybe residual, bool relu,
                 Maybe moments, Maybe in_scale, Maybe in_shift, bool in_relu, int64_t stride, int64_t pad_h,
                 int64_t pad_w, std::vector<int64_t> tile, int64_t warps) {
  HaloParams p = {};
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "halo_conv2d: x is neither bf16 nor fp16");
  STD_TORCH_CHECK(x.dim() == 5 && y.dim() == 5 && tile.size() == 3, "halo_conv2d: x and y have 5 dimensions, a tile 3");
  for (const Tensor* t : {&x, &y})
    for (int64_t i = 0; i < 5; i++)
      STD_TORCH_CHECK(t->size(i) > 0 && t->size(i) < (1 << 30), "halo_conv2d: a size is zero or beyond 2^30");
  STD_TORCH_CHECK((stride == 1 || stride == 2) && pad_h >= 0 && pad_h <= 2 && pad_w >= 0 && pad_w <= 2 && warps > 0 &&
                      warps <= 8,
                  "halo_conv2d: stride is 1 or 2, padding 0 to 2, warps 1 to 8");
  const int64_t K = x.size(0), N = x.size(1), H = x.size(2), W = x.size(3), C = x.size(4), O = y.size(4);
  const int64_t OH = (H + 2 * pad_h - 3) / stride + 1, OW = (W + 2 * pad_w - 3) / stride + 1;
  STD_TORCH_CHECK(H + 2 * pad_h >= 3 && W + 2 * pad_w >= 3, "halo_conv2d: x is smaller than the kernel");
  const std::vector<int64_t> out = {K, N, OH, OW, O};

  p.x_bytes = check_activation(x, {K, N, H, W, C}, x, "x", p.x_stride);
  p.y_bytes = check_activation(y, out, x, "y", p.y_stride);
  if (residual) p.residual_pairs = check_activation(*residual, out, x, "residual", p.residual_stride) >= 4;
  check_dense(weight, {K, O, 3, 3, C}, x, "weight");
  STD_TORCH_CHECK(weight.scalar_type() == type, "halo_conv2d: weight is of another type than x");
  const uint64_t weight_bits = (uint64_t)weight.data_ptr() | (uint64_t)(C * 2);
  p.weight_bytes = weight_bits % 16 == 0 ? 16 : weight_bits % 8 == 0 ? 8 : 2;
  if (bias) {
    check_dense(*bias, {K, O}, x, "bias");
    p.bias_half = bias->scalar_type() == type;
    STD_TORCH_CHECK(p.bias_half || bias->scalar_type() == ScalarType::Float,
                    "halo_conv2d: bias is neither float32 nor of x's type");
    p.bias = bias->data_ptr();
  }
  STD_TORCH_CHECK(scale.has_value() == shift.has_value() && in_scale.has_value() == in_shift.has_value(),
                  "halo_conv2d: a scale without its shift");

  p.x = (const uint16_t*)x.data_ptr();
  p.weight = (const uint16_t*)weight.data_ptr();
  p.y = (uint16_t*)y.data_ptr();
  p.residual = residual ? (const uint16_t*)residual->data_ptr() : nullptr;
  p.scale = floats(scale, K, O, x, "scale");
  p.shift = floats(shift, K, O, x, "shift");
  p.in_scale = floats(in_scale, K, C, x, "in_scale");
  p.in_shift = floats(in_shift, K, C, x, "in_shift");
  p.relu = relu;
  p.in_relu = in_relu;
  p.type = type == ScalarType::BFloat16 ? HALO_BF16 : HALO_FP16;
  p.K = K, p.N = N, p.H = H, p.W = W, p.C = C, p.OH = OH, p.OW = OW, p.O = O;
  p.stride = stride, p.pad_h = pad_h, p.pad_w = pad_w;
  p.images = tile[0], p.rows = tile[1], p.columns = tile[2], p.warps = warps;
  STD_TORCH_CHECK(p.images > 0 && p.rows > 0 && p.columns > 0, "halo_conv2d: an empty tile");
  if (moments) {
    const auto parts = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
    const int64_t pieces = parts(N, p.images) * parts(OH, p.rows) * parts(OW, p.columns);
    check_dense(*moments, {K, pieces, 3, O}, x, "moments");
    STD_TORCH_CHECK(moments->scalar_type() == ScalarType::Float, "halo_conv2d: moments is not float32");
    p.moments = (float*)moments->data_ptr();
  }

#ifdef HALO_EMULATION
  emulation::ranges.clear();
  for (const Maybe& t : {Maybe(x), Maybe(weight), bias, scale, shift, residual, in_scale, in_shift})
    if (t) allow(*t, false);
  allow(y, true);
  if (moments) allow(*moments, true);
  const char* wrong = halo_launch(p, nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* wrong = halo_launch(p, stream);
#endif
  STD_TORCH_CHECK(wrong == nullptr, "halo_conv2d: ", wrong);
}

}  // namespace

#ifdef HALO_EMULATION
STABLE_TORCH_LIBRARY_IMPL(decompk, CPU, m) { m.impl("halo_conv2d", TORCH_BOX(&halo_conv2d)); }

// What tests ask and break through ctypes: see `emulation::Counts`.
extern "C" void halo_emulation_counts(int64_t* to) {
  const auto& c = emulation::counts;
  const int64_t values[] = {c.matrices, c.bank_conflicts, c.products, c.bytes_read, c.bytes_written};
  for (int i = 0; i < 5; i++) to[i] = values[i];
  emulation::counts = {};
}
extern "C" void halo_emulation_break(bool without_barriers, int64_t shortened) {
  emulation::without_barriers = without_barriers;
  emulation::shortened = shortened;
}
#else
STABLE_TORCH_LIBRARY_IMPL(decompk, CUDA, m) { m.impl("halo_conv2d", TORCH_BOX(&halo_conv2d)); }
#endif
