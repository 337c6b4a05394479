// A stretch of a network, layers, poolings and what flattens images, one after the other: one call each way.
#include "conv.h"
#include "functions.h"

namespace {

enum Kind : Long { LAYER, POOL, FLATTEN };

// A layer, or a pooling, as `layer` and `max_pool` have it, or what a linear layer reads of images. Activations and gradients are places in two rooms, in floats,
// those of gradients in the part of each member, since members that are computed alone are at different steps.
struct Step {
  Long kind, relu, by, by_back;
  Long x, residual, y, z, saved;  // saved: what the norm saved, or where a pooling found its maxima
  Long dz, dx, g, dy;
  Long room_dx, room_g;  // where dx and g are found first if they are added to what is there already, else nowhere
  double momentum, eps;
  Long sizes[14];
};
enum Place : Long { NONE = -1, GIVEN = -2, RESULT = -3 };  // nowhere; what the stretch is given, or that of its result

constexpr int TENSORS = 6, FOUND = 3;  // of a step: weight, bias, gamma, beta, running mean and variance; dw, dgamma, dbeta

template <typename T>
struct Room {
  T* first;
  T *given, *result;

  T* at(Long place) const {
    return place == GIVEN ? given : place == RESULT ? result : place == NONE ? nullptr : first + place;
  }
};

// Gradients of member k, or of all where it is negative; what is found lies where all members' would begin.
struct Gradients {
  float *first, *given, *result;
  Long members, size;  // of a member's part
  int k;

  float* at(Long place, Long of_member) const {
    if (place == NONE) return nullptr;
    if (place < 0) return place == GIVEN ? given : result;
    return k < 0 ? first + members * place : first + k * size + place - k * of_member;
  }
};

void add(const float* from, Long count, float* to) {
  constexpr Long piece = 4096;
#pragma omp parallel for
  for (Long start = 0; start < count; start += piece)
    each_vector(std::min(piece, count - start), [&](auto kind, Long i) {
      using vec = decltype(kind);
      store(to + start + i, load<vec>(to + start + i) + load<vec>(from + start + i));
    });
}

// What a step reads and writes of each member. But a layer's sizes know images alone, all members' in a row.
struct Share {
  Long in, out, first;  // floats; and the member they begin with
  Long sizes[14];  // of what is to do

  Share(const Step& s, Long members, int k) : first(std::max(k, 0)) {
    Shape all(s.sizes, BY_CHANNEL);
    Long parts = s.kind == LAYER ? 1 : members;
    in = all.inputs() / parts, out = all.outputs() / parts;
    std::copy_n(s.sizes, 14, sizes);
    if (k >= 0) sizes[1] /= members;
  }
};

// Images of (rows, columns) → (columns, rows).
void turn_over(const float* from, Long images, Long rows, Long columns, float* to) {
#pragma omp parallel for
  for (Long i = 0; i < images; ++i)
    for (Long c = 0; c < columns; ++c)
      for (Long r = 0; r < rows; ++r) to[(i * columns + c) * rows + r] = from[(i * rows + r) * columns + c];
}

}  // namespace

extern "C" {

// tensors: TENSORS of each step, null where there is none; those of the running statistics move.
void stretch(const Step* steps, Long count, Long members, const float* x, float* result, float* room, float* const* tensors) {
  Room<float> at{room, const_cast<float*>(x), result};
  by_member(int(members), [&](int k) {
    for (Long i = 0; i < count; ++i) {
      const Step& s = steps[i];
      float* const* own = tensors + i * TENSORS;
      if (s.kind != LAYER) {
        Share of(s, members, k);
        const float* from = at.at(s.x) + of.first * of.in;
        float* to = at.at(s.y) + of.first * of.out;
        if (s.kind == FLATTEN) turn_over(from, of.sizes[1], of.sizes[4] * of.sizes[5], of.sizes[2], to);
        else max_pool(from, to, reinterpret_cast<unsigned char*>(at.at(s.saved)) + of.first * of.out, of.sizes);
      } else
        layer(at.at(s.x), own[0], own[1], own[2], own[3], own[4], own[5], at.at(s.residual), at.at(s.y), at.at(s.z),
              at.at(s.saved), int(s.relu), s.momentum, s.eps, int(s.by), s.sizes);
    }
  });
}

// Of dz, the result's gradient: dx, that of what was given, unless it is null, and FOUND of each step; what else there
// is as `stretch` left it. gradients: room for them, `size` floats a member.
void stretch_backward(const Step* steps, Long count, Long members, const float* x, const float* result, const float* room,
                      const float* dz, float* dx, float* gradients, Long size, float* const* tensors, float* const* found) {
  Room<const float> at{room, x, result};
  by_member(int(members), [&](int k) {
    Gradients of{gradients, dx, const_cast<float*>(dz), members, size, k};
    for (Long i = count; i-- > 0;) {
      const Step& s = steps[i];
      Share share(s, members, k);
      Long in = share.in, out = share.out;
      float *given = of.at(s.dz, out), *dx_whole = of.at(s.dx, in), *g_whole = of.at(s.g, out);
      float* to = dx_whole && s.room_dx != NONE ? of.at(s.room_dx, in) : dx_whole;
      float* passed = g_whole && s.room_g != NONE ? of.at(s.room_g, out) : g_whole;
      Long skipped_in = share.first * in, skipped_out = share.first * out, together = k < 0 ? members : 1;
      if (s.kind == FLATTEN) {
        if (to) turn_over(given + skipped_out, share.sizes[1], share.sizes[2], share.sizes[4] * share.sizes[5], to + skipped_in);
      } else if (s.kind == POOL) {
        auto places = reinterpret_cast<const unsigned char*>(at.at(s.saved)) + skipped_out;
        if (to) max_unpool(given + skipped_out, places, to + skipped_in, share.sizes);
      } else {
        bool norm = s.saved != NONE, decides = s.relu && (!norm || s.residual != NONE);
        float* const* own = found + i * FOUND;
        layer_backward(given, at.at(s.x), tensors[i * TENSORS], norm ? at.at(s.y) : nullptr,
                       decides ? at.at(norm ? s.z : s.y) : nullptr, at.at(s.saved), int(s.relu), to, own[0], own[1], own[2],
                       passed, of.at(s.dy, out), int(s.by_back), s.sizes);
      }
      if (to != dx_whole) add(to + skipped_in, together * in, dx_whole + skipped_in);
      if (passed != g_whole) add(passed + skipped_out, together * out, g_whole + skipped_out);
    }
  });
}

}  // extern "C"
