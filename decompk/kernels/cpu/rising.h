// The gradient of a convolution's output, formed where it is used: it is never written.
#pragma once

#include "conv.h"
#include "norm.h"

namespace {

// The gradient of a convolution's output, formed row by row: behind a norm as Gradients has it, or, without one, what
// the activation lets pass.
struct Rising {
  const Rows& r;
  const Gradients& t;
  Mask mask;
  bool norm;
  float* g;  // where what the activation lets pass goes, or null
  std::vector<float> vectors;  // [member][mean, scale, bias, share, slope][wide]

  Rising(const Rows& r, const Gradients& t, Mask mask, bool norm, float* g)
      : r(r), t(t), mask(mask), norm(norm), g(g), vectors(norm ? r.K * 5 * r.wide : 0) {
    if (!norm) return;
    for (Long k = 0; k < r.K; ++k) {
      const float* of[] = {t.mean, t.scale, t.bias, t.shares.data(), t.slopes.data()};
      for (int v = 0; v < 5; ++v) repeat(r, of[v] + k * r.C, &vectors[(k * 5 + v) * r.wide]);
    }
  }

  template <Mask mask, typename vec>
  void one(Long d, const float* own, Long c, float* to, float* passes) const {
    vec value = load<vec>(t.dy + d);
    if (!norm) {
      store(to, passed(mask, t.last, value, t.y + d, vec{}, vec{}, vec{}));
      return;
    }
    vec mean = load<vec>(own + c), scale = load<vec>(own + r.wide + c), bias = load<vec>(own + 2 * r.wide + c);
    value = passed(mask, t.last, value, t.decides(mask) + d, mean, scale, bias);
    if (passes) store(passes + d, value);
    vec share = load<vec>(own + 3 * r.wide + c), slope = load<vec>(own + 4 * r.wide + c);
    store(to, (value - share - (load<vec>(t.x + d) - mean) * slope) * scale);
  }

  template <Mask mask>
  void fill(int k, Long at, Long count, bool keeps, float* to) const {
    const float* own = vectors.data() + k * 5 * r.wide;
    float* passes = keeps ? g : nullptr;
    Long i = 0, c = 0;
    for (; i + LANES <= count; i += LANES, c = c + LANES < r.wide ? c + LANES : 0)
      one<mask, widest>(at + i, own, c, to + i, passes);
    for (; i < count; ++i, ++c) one<mask, float>(at + i, own, c, to + i, passes);
  }

  // `count` numbers from `at` on, the beginning of a row; keeps: whether g gets its part of them.
  void row(int k, Long at, Long count, bool keeps, float* to) const {
    if (mask == FROM_Y) fill<FROM_Y>(k, at, count, keeps, to);
    else if (mask == FROM_X) fill<FROM_X>(k, at, count, keeps, to);
    else fill<EVERYWHERE>(k, at, count, keeps, to);
  }

  // `tall` rows of `wide` pixels of a unit's images from (first - top, -left) on, with zeros outside of them, into `to`;
  // own(row's pixels, image, row) for each of the unit's `rows` from `first` on.
  template <typename Own>
  void window(const Shape& s, const Unit& u, Long first, Long rows, Long top, Long left, Long tall, Long wide, float* to,
              Own own) const {
    Long row = Long(s.columns) * s.O;
    for (int i = 0; i < u.images; ++i)
      for (Long h = 0; h < tall; ++h, to += wide * s.O) {
        Long of = first - top + h;
        bool inside = of >= 0 && of < s.rows, mine = of >= first && of < first + rows;
        float* pixels = to + left * s.O;
        std::fill(to, inside ? pixels : to + wide * s.O, 0.f);
        if (!inside) continue;
        this->row(u.k, ((Long(u.k) * s.N + u.n + i) * s.rows + of) * row, row, mine, pixels);
        std::fill(pixels + row, to + wide * s.O, 0.f);
        if (mine) own(pixels, i, of);
      }
  }

  void all(float* to) const {
#pragma omp parallel for
    for (Long unit = 0; unit < r.units(); ++unit)
      row(int(r.member(unit)), r.start(unit), r.count(unit) * r.C, true, to + r.start(unit));
  }
};

}  // namespace
