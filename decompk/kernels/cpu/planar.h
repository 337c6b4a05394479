// Convolutions with fewer outputs than a register has lanes, whose lanes are pixels instead: 16 of one channel.
//
// The channels of a unit's surroundings are taken apart into planes. There a kernel's tap is the same distance away for
// every pixel, also across the ends of rows; what is computed for the few pixels of padding there is not written.
#pragma once

#include "conv.h"

namespace {

// every `each`-th run of `each` lanes of a, then of b, from the run `first` on
template <int each, int first, int... i>
inline widest every_other(widest a, widest b, std::integer_sequence<int, i...>) {
  return mixed<(i / each * 2 * each + first * each + i % each)...>(a, b);
}

// Four channels of LANES pixels, a vector each ↔ pixel by pixel, a quarter of the pixels a vector.
inline void to_pixels(const widest (&c)[4], widest (&pixels)[4]) {
  every_lane all;
  widest low[2] = {in_turns<1, 0>(c[0], c[1], all), in_turns<1, 0>(c[2], c[3], all)};
  widest high[2] = {in_turns<1, LANES / 2>(c[0], c[1], all), in_turns<1, LANES / 2>(c[2], c[3], all)};
  pixels[0] = in_turns<2, 0>(low[0], low[1], all), pixels[1] = in_turns<2, LANES / 2>(low[0], low[1], all);
  pixels[2] = in_turns<2, 0>(high[0], high[1], all), pixels[3] = in_turns<2, LANES / 2>(high[0], high[1], all);
}
inline void to_channels(const widest (&pixels)[4], widest (&c)[4]) {
  every_lane all;
  widest low[2] = {every_other<2, 0>(pixels[0], pixels[1], all), every_other<2, 0>(pixels[2], pixels[3], all)};
  widest high[2] = {every_other<2, 1>(pixels[0], pixels[1], all), every_other<2, 1>(pixels[2], pixels[3], all)};
  c[0] = every_other<1, 0>(low[0], low[1], all), c[1] = every_other<1, 1>(low[0], low[1], all);
  c[2] = every_other<1, 0>(high[0], high[1], all), c[3] = every_other<1, 1>(high[0], high[1], all);
}

// Whether it pays to take channels apart; one tap has too little to do with them.
inline bool is_planar(int outputs, int taps) {
  return outputs < 16 && (outputs < LANES || outputs % 4) && taps > 1;
}

// Four channels of a quarter of LANES pixels, which are C floats apart.
inline widest four_of(const float* pixels, int C) {
  vec4 part[LANES / 4];
  for (int i = 0; i < LANES / 4; ++i) part[i] = load<vec4>(pixels + i * C);
  auto pair = [](vec4 a, vec4 b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); };
#ifdef __AVX512F__
  return __builtin_shufflevector(pair(part[0], part[1]), pair(part[2], part[3]), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                 13, 14, 15);
#else
  return pair(part[0], part[1]);
#endif
}

template <int known = 0>
inline void one_by_one(const float* pixels, Long count, int channels, float* planes, Long plane, Long at) {
  const int C = known ? known : channels;
  for (int c = 0; c < C; ++c)
    for (Long p = 0; p < count; ++p) planes[c * plane + at + p] = pixels[p * C + c];
}

// The planes of `count` pixels of C channels that lie in a row, from place `at` of every plane on.
inline void split(const float* pixels, Long count, int C, float* planes, Long plane, Long at) {
  Long p = 0;
  if (C % 4 == 0)
    for (; p + LANES <= count; p += LANES)
      for (int c = 0; c < C; c += 4) {
        widest from[4], channels[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) from[v] = four_of(pixels + (p + v * (LANES / 4)) * C + c, C);
        to_channels(from, channels);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(planes + (c + i) * plane + at + p, channels[i]);
      }
  if (C == 3) return one_by_one<3>(pixels, count, C, planes, plane, at);
  one_by_one(pixels + p * C, count - p, C, planes, plane, at + p);
}

// `P` vectors of pixels from `at` on, O outputs of each: to[pixel][O of `outputs`]; weight [taps][C][O]
template <int P, int O>
inline void planar_tile(const float* at, Long plane, Long wide, int taps_h, int taps_w, int C, const float* weight,
                        const float* start, float* to, int outputs) {
  widest sum[O][P];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    widest first = start ? start[o] - widest{} : widest{};
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[o][p] = first;
  }
  for (int r = 0; r < taps_h; ++r)
    for (int t = 0; t < taps_w; ++t) {
      const float* from = at + r * wide + t;
      for (int c = 0; c < C; ++c, from += plane, weight += O) {
        widest value[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) value[p] = load<widest>(from + p * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) {
          widest w = weight[o] - widest{};
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[o][p] += value[p] * w;
        }
      }
    }
  constexpr int QUADS = (O + 3) / 4;
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p, to += LANES * outputs) {
    widest pixels[QUADS][4];
#pragma GCC unroll 2
    for (int q = 0; q < QUADS; ++q) {
      auto of = [&](int o) { return o < O ? sum[o < O ? o : 0][p] : widest{}; };
      widest channels[4] = {of(4 * q), of(4 * q + 1), of(4 * q + 2), of(4 * q + 3)};
      to_pixels(channels, pixels[q]);
    }
    every_lane all;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      if (O == 4 && outputs == O) store(to + v * LANES, pixels[0][v]);
      else if (O == 8 && outputs == O) {
        store(to + 2 * v * LANES, in_turns<4, 0>(pixels[0][v], pixels[O / 8][v], all));
        store(to + (2 * v + 1) * LANES, in_turns<4, LANES / 2>(pixels[0][v], pixels[O / 8][v], all));
      } else
#pragma GCC unroll 2
        for (int q = 0; q < QUADS; ++q)
#pragma GCC unroll 4
          for (int i = 0; i < LANES / 4; ++i)
            std::memcpy(to + (v * (LANES / 4) + i) * outputs + 4 * q, reinterpret_cast<float*>(&pixels[q][v]) + 4 * i,
                        sizeof(float) * std::min(O - 4 * q, 4));
    }
  }
}

constexpr int ALL_SUMS = LANES == 16 ? 24 : 8;  // that registers hold
constexpr int at_once(int outputs) { return std::max(ALL_SUMS / std::max(outputs, 4), 1); }  // vectors of pixels

// `planar_tile` for P vectors or as many as fit, by the number of outputs.
template <int P, int... o>
auto planar_tiles(std::integer_sequence<int, o...>) {
  return std::array{planar_tile<std::min(P, at_once(o + 1)), o + 1>...};
}

// Of surroundings `from`, `images` times `tall` rows of `wide` pixels of C channels: `rows` rows of `columns` pixels of
// `outputs` each, where to(image, row) says; weight: in blocks, see conv.h.
template <typename To>
inline void planar(const Surroundings& from, int images, int C, int taps_h, int taps_w, const float* weight,
                   const float* start, int outputs, int rows, int columns, To to) {
  Long wide = from.wide, count = rows * wide;
  Long plane = (count + LANES - 1) / LANES * LANES + taps_h * wide + LANES;
  float* planes = scratch<float, PLANES>(C * plane);
  float* result = scratch<float, PIXELS_OF_PLANES>((count + LANES - 1) / LANES * LANES * outputs);
  for (int i = 0; i < images; ++i) {
    const float* image = from.start + i * from.image_step;
    if (from.step == wide * C) split(image, from.tall * wide, C, planes, plane, 0);
    else
      for (Long h = 0; h < from.tall; ++h) split(image + h * from.step, wide, C, planes, plane, h * wide);
    for (int o = 0, width; o < outputs; o += width) {
      width = width_of(outputs - o);
      const float *own = weight + Long(o) * taps_h * taps_w * C, *level = start ? start + o : nullptr;
      for (Long p = 0, vectors = (count + LANES - 1) / LANES; vectors > 0;) {
        auto tile = [&](auto size) {
          constexpr int P = decltype(size)::value;
          auto run = planar_tiles<P>(std::make_integer_sequence<int, 8>())[width - 1];
          int done = std::min(P, at_once(width));
          run(planes + p, plane, wide, taps_h, taps_w, C, own, level, result + p * outputs + o, outputs);
          p += done * LANES, vectors -= done;
        };
        if (vectors >= ALL_SUMS / 4) tile(std::integral_constant<int, ALL_SUMS / 4>{});
        else if (vectors >= 4 && ALL_SUMS / 4 > 4) tile(std::integral_constant<int, 4>{});
        else if (vectors == 3 && ALL_SUMS / 4 > 3) tile(std::integral_constant<int, 3>{});
        else if (vectors >= 2) tile(std::integral_constant<int, 2>{});
        else tile(std::integral_constant<int, 1>{});
      }
    }
    for (int h = 0; h < rows; ++h) copy(result + h * wide * outputs, Long(columns) * outputs, to(i, h));
  }
}

}  // namespace
