// Drives the halo kernel's emulation for tools/sanitize.py: a line of stdin is a problem, a line of stdout what is wrong.
//
// Every tensor is an allocation of its own, of the exact size; outputs are full of NaN before. What is
// wrong: values of y or moments that are not those of plain loops in double, and whatever the emulation complains of.
#include "../csrc/halo.cu"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <random>
#include <sstream>

namespace {

using Halves = std::vector<uint16_t>;
using Floats = std::vector<float>;
constexpr uint16_t NAN_HALF = 0x7fff;  // of either type
std::mt19937 engine;

float normal() { return std::normal_distribution<float>()(engine); }

Halves halves(size_t size, float scale = 1) {
  Halves found(size);
  for (auto& v : found) v = emulation::half_of_float(normal() * scale);
  return found;
}

Floats floats(bool wanted, size_t size) {
  Floats found(wanted ? size : 0);
  for (auto& v : found) v = normal();
  return found;
}

template <class T> auto* pointer(std::vector<T>& t) { return t.empty() ? nullptr : t.data(); }

template <class T> void allow(std::vector<T>& t, bool written) {
  if (!t.empty()) emulation::allow(t.data(), t.size() * sizeof(T), written);
}

// The widest access to pixels of `channels` values, and their strides in a dense (K, N, H, W, C) tensor.
int dense(int64_t (&strides)[4], int K, int N, int H, int W, int C) {
  const int64_t all[] = {int64_t(N) * H * W * C, int64_t(H) * W * C, int64_t(W) * C, C};
  const int sizes[] = {K, N, H, W};
  for (int i = 0; i < 4; i++) strides[i] = sizes[i] == 1 ? 0 : all[i];
  return C % 8 == 0 ? 16 : C % 4 == 0 ? 8 : C % 2 == 0 ? 4 : 2;
}

// Of the values of one channel of a member, before what follows the convolution and its bias.
struct Values {
  double count = 0, sum = 0, squares = 0, largest = 1;

  void add(double value) { count++, sum += value, squares += value * value, largest = std::max(largest, std::abs(value)); }
};

// Whether the tiles' counts, means and Σ(y − mean)², each `step` floats from the last, are together those of the values.
bool same_moments(const float* at, int pieces, int step, const Values& values, double tolerance) {
  double count = 0, sum = 0, squares = 0;
  for (int piece = 0; piece < pieces; piece++, at += 3 * step) {
    const double mean = at[step];
    count += at[0], sum += at[0] * mean, squares += at[2 * step] + at[0] * mean * mean;
  }
  const double n = values.count, mean = values.sum / n, slack = tolerance * values.largest;
  return count == n && std::abs(sum / n - mean) <= slack &&
         std::abs(squares / n - sum / n * (sum / n) - (values.squares / n - mean * mean)) <= slack * values.largest;
}

std::string run(std::istream& line) {
  HaloParams p = {};
  bool biased, affine, residual, prologue, moments;
  line >> p.type >> p.K >> p.N >> p.C >> p.O >> p.H >> p.W >> p.stride >> p.pad_h >> p.pad_w >> p.images >> p.rows;
  line >> p.columns >> p.warps >> biased >> affine >> residual >> p.relu >> prologue >> p.in_relu >> moments;
  if (!line) return "a line of too few numbers";
  emulation::type = p.type;
  p.OH = (p.H + 2 * p.pad_h - 3) / p.stride + 1, p.OW = (p.W + 2 * p.pad_w - 3) / p.stride + 1;
  const size_t inputs = size_t(p.K) * p.N * p.H * p.W * p.C, outputs = size_t(p.K) * p.N * p.OH * p.OW * p.O;
  const auto parts = [](int n, int by) { return (n + by - 1) / by; };
  const int pieces = parts(p.N, p.images) * parts(p.OH, p.rows) * parts(p.OW, p.columns);

  Halves x = halves(inputs), weight = halves(p.K * p.O * 9 * p.C, 1 / std::sqrt(9.f * p.C));
  Halves y(outputs, NAN_HALF), other = halves(residual ? outputs : 0);
  Floats bias = floats(biased, p.K * p.O), scale = floats(affine, p.K * p.O), shift = floats(affine, p.K * p.O);
  Floats in_scale = floats(prologue, p.K * p.C), in_shift = floats(prologue, p.K * p.C);
  Floats found(moments ? p.K * pieces * 3 * p.O : 0, std::numeric_limits<float>::quiet_NaN());
  p.x_bytes = dense(p.x_stride, p.K, p.N, p.H, p.W, p.C), p.y_bytes = dense(p.y_stride, p.K, p.N, p.OH, p.OW, p.O);
  p.residual_pairs = dense(p.residual_stride, p.K, p.N, p.OH, p.OW, p.O) >= 4;
  p.weight_bytes = p.x_bytes == 4 ? 2 : p.x_bytes;
  p.x = x.data(), p.weight = weight.data(), p.y = y.data(), p.residual = pointer(other), p.bias = pointer(bias);
  p.scale = pointer(scale), p.shift = pointer(shift), p.in_scale = pointer(in_scale), p.in_shift = pointer(in_shift);
  p.moments = pointer(found);

  emulation::ranges.clear();
  for (Halves* t : {&x, &weight, &other}) allow(*t, false);
  for (Floats* t : {&bias, &scale, &shift, &in_scale, &in_shift}) allow(*t, false);
  allow(y, true), allow(found, true);
  if (const char* wrong = halo_launch(p, nullptr)) return wrong;

  const auto number = [](uint16_t half) { return (double)emulation::float_of_half(half); };
  const double tolerance = p.type == HALO_BF16 ? 0.02 : 0.004;
  double worst = 0, largest = 1;
  std::vector<Values> values(p.K * p.O);
  for (size_t at = 0; at < outputs; at++) {
    const int o = at % p.O, column = at / p.O % p.OW, row = at / p.O / p.OW % p.OH, image = at / p.O / p.OW / p.OH;
    const int k = image / p.N;
    double sum = biased ? bias[k * p.O + o] : 0;
    for (int r = 0; r < 3; r++)
      for (int t = 0; t < 3; t++) {
        const int h = row * p.stride + r - p.pad_h, w = column * p.stride + t - p.pad_w;
        if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
        for (int c = 0; c < p.C; c++) {
          double value = number(x[((size_t(image) * p.H + h) * p.W + w) * p.C + c]);
          if (prologue) value = value * in_scale[k * p.C + c] + in_shift[k * p.C + c];
          if (prologue && p.in_relu) value = std::max(value, 0.);
          sum += value * number(weight[((size_t(k * p.O + o) * 3 + r) * 3 + t) * p.C + c]);
        }
      }
    values[k * p.O + o].add(sum);
    if (affine) sum = sum * scale[k * p.O + o] + shift[k * p.O + o];
    if (residual) sum += number(other[at]);
    if (p.relu) sum = std::max(sum, 0.);
    const double error = std::abs(number(y[at]) - sum);
    if (error != error) return "y is NaN at " + std::to_string(at);
    worst = std::max(worst, error), largest = std::max(largest, std::abs(sum));
  }
  for (int i = 0; moments && i < p.K * p.O; i++)
    if (!same_moments(&found[i / p.O * pieces * 3 * p.O + i % p.O], pieces, p.O, values[i], tolerance))
      return "moments of channel " + std::to_string(i % p.O) + " of member " + std::to_string(i / p.O) + " are wrong";
  if (worst > largest * tolerance) return "y is wrong by " + std::to_string(worst);
  return "";
}

}  // namespace

int main() {
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    unsigned seed;
    line >> seed;
    engine.seed(seed);
    std::cout << "answer: " << run(line) << std::endl;
  }
}
