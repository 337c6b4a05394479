// What the halo kernel computes, as one plain struct for binding, launcher and kernel: no torch, no CUDA headers.
#pragma once
#include <stdint.h>

enum HaloType { HALO_BF16 = 0, HALO_FP16 = 1 };

// Copies between host and device code; pointers to 2-byte values are to the type of `type`.
struct HaloParams {
  // x (K, N, H, W, C), y and residual (K, N, OH, OW, O): strides in values, of member, image, row, column; channels
  // are adjacent. weight (K, O, 3, 3, C) dense. *_bytes: the widest access that base, strides and channels allow: 16, 8
  // or less.
  const uint16_t* x;
  const uint16_t* weight;
  uint16_t* y;
  const uint16_t* residual;
  int64_t x_stride[4], y_stride[4], residual_stride[4];
  int x_bytes, weight_bytes, y_bytes;
  bool residual_pairs;  // two channels of the residual are one aligned load
  // (K, O), or null: bias is float32, or 2-byte where bias_half says so; (K, C) of the input; moments (K, tiles, 3, O).
  const void* bias;
  const float* scale;
  const float* shift;
  const float* in_scale;
  const float* in_shift;
  float* moments;
  bool bias_half, relu, in_relu;
  int type, K, N, H, W, C, OH, OW, O;
  int stride, pad_h, pad_w;
  int images, rows, columns;  // output pixels of a tile
  int warps;

  // Filled in by halo_launch. A warp's 16 lanes of pixels are `columns` of each of lane_images images, in one row; its
  // rows are `strips_per_image`-th parts of an image's. A row of the halo holds, for stride 2 apart for even and odd
  // columns, image_pitch columns of each of these images.
  int tiles_h, tiles_w, tiles;
  int log_columns, lane_images, strips_per_image;
  int image_pitch, half_pitch, pitch, image_rows, stage_rows;
  int inverse_image_pitch, inverse_pitch, inverse_image_rows;  // 2^16 / n, rounded up
  int step_rows, step_columns;                                 // from one chunk that a thread copies to its next
  int stage_bytes, weights_at, output_at, moments_at, shared_bytes;
};

// Input and output channels as a kernel pads them: powers of two from 8 to 64, at most a factor of two apart, which is
// what networks have; ten kernels instead of sixteen.
inline void halo_blocks(int C, int O, int& ci, int& ob) {
  for (ci = 8; ci < C || 2 * ci < O; ci *= 2);
  for (ob = 8; ob < O || 2 * ob < ci; ob *= 2);
}

// Queues the kernel on a CUDA stream (runs it, in the emulation); null, or why it cannot be done.
const char* halo_launch(const HaloParams& params, void* stream);
