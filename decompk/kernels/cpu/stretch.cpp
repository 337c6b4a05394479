// A stretch of a network, layers and poolings one after the other, forward and backward: one call each way.
#include "conv.h"
#include "functions.h"

namespace {

// A layer, or a pooling, as `layer` and `max_pool` have it. Activations and gradients are places in two rooms, in floats.
struct Step {
  Long pools, relu, winograd, winograd_back;
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

void add(const float* from, Long count, float* to) {
  constexpr Long piece = 4096;
#pragma omp parallel for
  for (Long start = 0; start < count; start += piece)
    each_vector(std::min(piece, count - start), [&](auto kind, Long i) {
      using vec = decltype(kind);
      store(to + start + i, load<vec>(to + start + i) + load<vec>(from + start + i));
    });
}

}  // namespace

extern "C" {

// tensors: TENSORS of each step, null where there is none; those of the running statistics move.
void stretch(const Step* steps, Long count, const float* x, float* result, float* room, float* const* tensors) {
  Room<float> at{room, const_cast<float*>(x), result};
  for (const Step* s = steps; s < steps + count; ++s, tensors += TENSORS) {
    if (s->pools) max_pool(at.at(s->x), at.at(s->y), reinterpret_cast<unsigned char*>(at.at(s->saved)), s->sizes);
    else
      layer(at.at(s->x), tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], at.at(s->residual),
            at.at(s->y), at.at(s->z), at.at(s->saved), int(s->relu), s->momentum, s->eps, int(s->winograd), s->sizes);
  }
}

// Of dz, the result's gradient: dx, that of what was given, unless it is null, and FOUND of each step; what else there
// is as `stretch` left it. gradients: room for them.
void stretch_backward(const Step* steps, Long count, const float* x, const float* result, const float* room, const float* dz,
                      float* dx, float* gradients, float* const* tensors, float* const* found) {
  Room<const float> at{room, x, result};
  Room<float> of{gradients, dx, const_cast<float*>(dz)};
  for (Long i = count; i-- > 0;) {
    const Step& s = steps[i];
    Shape sizes(s.sizes, false);
    const float* given = of.at(s.dz);
    float *dx_whole = of.at(s.dx), *g_whole = of.at(s.g);
    float* to = dx_whole && s.room_dx != NONE ? of.at(s.room_dx) : dx_whole;
    float* passed = g_whole && s.room_g != NONE ? of.at(s.room_g) : g_whole;
    if (s.pools) max_unpool(given, reinterpret_cast<const unsigned char*>(at.at(s.saved)), to, s.sizes);
    else {
      bool norm = s.saved != NONE, decides = s.relu && (!norm || s.residual != NONE);
      float* const* own = found + i * FOUND;
      layer_backward(given, at.at(s.x), tensors[i * TENSORS], norm ? at.at(s.y) : nullptr,
                     decides ? at.at(norm ? s.z : s.y) : nullptr, at.at(s.saved), int(s.relu), to, own[0], own[1], own[2],
                     passed, of.at(s.dy), int(s.winograd_back), s.sizes);
    }
    Long images = Long(sizes.K) * sizes.N;
    if (to != dx_whole) add(to, images * sizes.H * sizes.W * sizes.C, dx_whole);
    if (passed != g_whole) add(passed, images * sizes.rows * sizes.columns * sizes.O, g_whole);
  }
}

}  // extern "C"
