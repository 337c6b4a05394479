// Maxima of windows of images NHWC, float32, with the place of each in its window, and back: image by image.
#include "conv.h"

namespace {

// The places of a vector's maxima: whole numbers while they are sought, bytes in memory.
template <typename whole, typename bytes>
struct Places {
  typedef whole numbers;
  static numbers at(const unsigned char* from) {
    bytes value;
    std::memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, numbers);
  }
  static void keep(unsigned char* to, numbers places) {
    bytes value = __builtin_convertvector(places, bytes);
    std::memcpy(to, &value, sizeof value);
  }
};
typedef int int4 __attribute__((vector_size(16)));
typedef int int8 __attribute__((vector_size(32)));
typedef int int16 __attribute__((vector_size(64)));
typedef unsigned char bytes4 __attribute__((vector_size(4)));
typedef unsigned char bytes8 __attribute__((vector_size(8)));
typedef unsigned char bytes16 __attribute__((vector_size(16)));

template <typename vec>
struct Lanes;
template <>
struct Lanes<vec16> : Places<int16, bytes16> {};
template <>
struct Lanes<vec8> : Places<int8, bytes8> {};
template <>
struct Lanes<vec4> : Places<int4, bytes4> {};
template <>
struct Lanes<float> {
  typedef int numbers;
  static int at(const unsigned char* from) { return *from; }
  static void keep(unsigned char* to, int place) { *to = (unsigned char)place; }
};

struct Taps {  // of a window from `first` on, those that lie within `size`
  int begin, end;

  Taps(int first, int taps, int size) : begin(std::max(0, -first)), end(std::min(taps, size - first)) {}
  bool all(int taps) const { return begin == 0 && end == taps; }
};

// body(pixel of y, first pixel of its window, taps down, taps across) for a row of y; taps are constants where the
// window is 2×2 or 3×3 and whole.
template <typename F>
inline void each_window(const Shape& s, int h, F body) {
  int top = h * s.stride_h - s.pad_h;
  Taps down(top, s.kh, s.H);
  for (int w = 0; w < s.columns; ++w) {
    int left = w * s.stride_w - s.pad_w;
    Taps across(left, s.kw, s.W);
    Long at = Long(top) * s.W + left;
    bool whole = down.all(s.kh) && across.all(s.kw) && s.kh == s.kw;
    if (whole && s.kh == 2) body(w, at, std::integral_constant<int, 2>{}, down, across);
    else if (whole && s.kh == 3) body(w, at, std::integral_constant<int, 3>{}, down, across);
    else body(w, at, std::integral_constant<int, 0>{}, down, across);
  }
}

// f(tap, its pixel from the window's first on) for the taps of a window that lie in the image
template <int size, typename F>
inline void each_in_window(const Shape& s, std::integral_constant<int, size>, Taps down, Taps across, F f) {
  if constexpr (size > 0) {
#pragma GCC unroll 9
    for (int tap = 0; tap < size * size; ++tap) f(tap, Long(tap / size) * s.W + tap % size);
  } else
    for (int r = down.begin; r < down.end; ++r)
      for (int t = across.begin; t < across.end; ++t) f(r * s.kw + t, Long(r) * s.W + t);
}

// dx of one image: where `adds`, windows overlap, and dx is zero before
template <bool adds>
void unpool(const Shape& s, const float* dy, const unsigned char* place, float* dx) {
  for (int h = 0; h < s.rows; ++h)
    each_window(s, h, [&](int w, Long first, auto size, Taps down, Taps across) {
      Long from = (Long(h) * s.columns + w) * s.C;
      each_vector(s.C, [&](auto kind, Long c) {
        using vec = decltype(kind);
        vec value = load<vec>(dy + from + c);
        auto at = Lanes<vec>::at(place + from + c);
        each_in_window(s, size, down, across, [&](int tap, Long pixel) {
          float* to = dx + (first + pixel) * s.C + c;
          vec part = at == tap ? value : vec{};
          store(to, adds ? load<vec>(to) + part : part);
        });
      });
    });
}

}  // namespace

extern "C" {

// y, and in place which of its window's kh · kw values it is: the first of the largest, or the last that is no number.
// sizes: Shape in conv.h, K = 1 and N all images. Every window meets the image.
void max_pool(const float* x, float* y, unsigned char* place, const Long* sizes) {
  Shape s(sizes, BY_CHANNEL);
#pragma omp parallel for collapse(2) schedule(static)
  for (int n = 0; n < s.N; ++n)
    for (int h = 0; h < s.rows; ++h) {
      const float* image = x + Long(n) * s.H * s.W * s.C;
      Long row = (Long(n) * s.rows + h) * s.columns * s.C;
      each_window(s, h, [&](int w, Long first, auto size, Taps down, Taps across) {
        each_vector(s.C, [&](auto kind, Long c) {
          using vec = decltype(kind);
          using numbers = typename Lanes<vec>::numbers;
          const float* from = image + first * s.C + c;
          int begin = down.begin * s.kw + across.begin;
          vec most = load<vec>(from + (Long(down.begin) * s.W + across.begin) * s.C);
          numbers at = numbers{} + begin;
          each_in_window(s, size, down, across, [&](int tap, Long pixel) {
            vec one = load<vec>(from + pixel * s.C);
            auto larger = (one > most) | (one != one);
            most = larger ? one : most;
            at = larger ? numbers{} + tap : at;
          });
          store(y + row + w * s.C + c, most);
          Lanes<vec>::keep(place + row + w * s.C + c, at);
        });
      });
    }
}

void max_unpool(const float* dy, const unsigned char* place, float* dx, const Long* sizes) {
  Shape s(sizes, BY_CHANNEL);
  bool adds = s.kh > s.stride_h || s.kw > s.stride_w;
  bool all = s.kh == s.stride_h && s.kw == s.stride_w && s.rows * s.kh == s.H && s.columns * s.kw == s.W && !s.pad_h && !s.pad_w;
  Long image = Long(s.H) * s.W * s.C, pooled = Long(s.rows) * s.columns * s.C;
#pragma omp parallel for schedule(static)
  for (int n = 0; n < s.N; ++n) {
    float* to = dx + n * image;
    if (!all) std::fill(to, to + image, 0.f);
    (adds ? unpool<true> : unpool<false>)(s, dy + n * pooled, place + n * pooled, to);
  }
}

}  // extern "C"
