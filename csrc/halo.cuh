// The halo convolution: 3 × 3, stride 1 or 2, of K members, every input value read once.
//
// A CTA walks over pixel tiles of one member, its weights at hand. The tile's input with its one-pixel halo is staged
// in shared memory, two tiles in turn: one arrives while the other's nine taps are multiplied on tensor cores. The 16
// rows of a matrix product are 16 output pixels of one image row (or of the same row in 2 or 4 narrow images), so one
// load of an input row's matrix serves the three output rows that it touches. Warps share nothing but the staged input:
// each computes 4 such rows times up to 32 channels, and stages and stores its own output.
#pragma once
#include "prim.cuh"

template <int CI_, int OB_, int STRIDE_, int TYPE_, int BLOCKS_> struct Halo {
  static constexpr int CI = CI_, OB = OB_, STRIDE = STRIDE_, TYPE = TYPE_;  // channels, padded, of input and output
  static constexpr int THREADS = OB == 64 ? 256 : 128, BLOCKS = BLOCKS_;    // at most, and CTAs a processor at least
  static constexpr int ROWS = 4, INPUT_ROWS = (ROWS - 1) * STRIDE + 3;      // of one warp
  static constexpr int WARP_OB = OB < 32 ? OB : 32, PARTS = OB / WARP_OB;   // output channels of one warp
  static constexpr int NT = WARP_OB / 8, CHUNKS = CI / 8;                   // 8 × 8 matrices; a chunk is 16 bytes
  static constexpr bool RESIDENT = 9 * CHUNKS * NT <= 36;                   // weights stay in registers
  static constexpr int PIXEL = CI * 2, OUTPUT_PIXEL = WARP_OB * 2;          // bytes
  static constexpr int OUTPUT_BYTES = ROWS * 16 * OUTPUT_PIXEL;
};

// Rows of 16, 32, 64 or 128 bytes lie 8, 4, 2 or 1 to a line of 32 banks. With its chunks XORed by this, the same chunk
// of any 8 rows whose numbers differ modulo 8 lies in 8 different quarters of banks.
template <int BYTES> DEVICE int swizzle(int row) {
  return BYTES == 128 ? row & 7 : BYTES == 64 ? (row >> 1) & 3 : BYTES == 32 ? (row >> 2) & 1 : 0;
}

struct Tile {
  int image, row, column;  // of its first output pixel
};

DEVICE Tile tile_at(const HaloParams& p, int index) {
  const int above = index / p.tiles_w, images = above / p.tiles_h;
  return {images * p.images, (above - images * p.tiles_h) * p.rows, (index - above * p.tiles_w) * p.columns};
}

// Where lanes put the images they share: the four of 4 columns in the order 0, 2, 1, 3, which keeps 8 lanes of two
// images apart modulo 8. Its own inverse.
DEVICE int slot_of(const HaloParams& p, int image) {
  return p.lane_images == 4 ? (image & 1) << 1 | image >> 1 : image;
}

// Columns from a row's start to the pixel of lane 0 … 15.
DEVICE int lane_column(const HaloParams& p, int lane) {
  return slot_of(p, lane >> p.log_columns) * p.image_pitch + (lane & (p.columns - 1));
}

// Calls f(shared address, source, channels) for every 16-byte chunk of the tile's input that this thread looks after;
// channels = 0 where padding or the neighbour's memory begins.
template <class S, class F> DEVICE void for_each_chunk(const HaloParams& p, const Tile& tile, uint32_t stage, F f) {
  const int chunk = thread_index() % S::CHUNKS, first = thread_index() / S::CHUNKS;
  const int left = p.C - chunk * 8, channels = left < 0 ? 0 : left > 8 ? 8 : left;
  const uint16_t* x = p.x + block_member() * p.x_stride[0];
  const int top = tile.row * S::STRIDE - p.pad_h, start = tile.column * S::STRIDE - p.pad_w;
  const int used_columns = (p.columns - 1) * S::STRIDE + 3;
  int row = first * p.inverse_pitch >> 16, column = first - row * p.pitch;
  while (row < p.stage_rows) {
    const int odd = S::STRIDE == 2 && column >= p.half_pitch;
    const int inner = column - odd * p.half_pitch;
    const int slot = inner * p.inverse_image_pitch >> 16;
    const int w = (inner - slot * p.image_pitch) * S::STRIDE + odd;
    const int group = row * p.inverse_image_rows >> 16;
    const int image = tile.image + group * p.lane_images + slot_of(p, slot);
    const int h_in = top + row - group * p.image_rows, w_in = start + w;
    if (S::STRIDE == 1 || w < used_columns) {
      const bool inside = image < p.N && (unsigned)h_in < (unsigned)p.H && (unsigned)w_in < (unsigned)p.W;
      const uint32_t to = stage + (row * p.pitch + column) * S::PIXEL + ((chunk ^ swizzle<S::PIXEL>(column)) << 4);
      const int64_t offset = image * p.x_stride[1] + h_in * p.x_stride[2] + w_in * p.x_stride[3] + chunk * 8;
      f(to, inside && channels > 0 ? x + offset : x, inside ? channels : 0);
    }
    row += p.step_rows;
    column += p.step_columns;
    if (column >= p.pitch) {
      column -= p.pitch;
      row++;
    }
  }
}

// One chunk from global to shared memory, zeros after `channels`; `widest` access in bytes.
DEVICE void fill_chunk(uint32_t to, const uint16_t* from, int channels, int widest) {
  if (widest == 16) {
    copy16(to, from, channels > 0 ? 16 : 0);
  } else if (widest == 8) {
    copy8(to, from, channels > 0 ? 8 : 0);
    copy8(to + 8, channels > 4 ? from + 4 : from, channels > 4 ? 8 : 0);
  } else {
    uint32_t v[8];
    UNROLL for (int i = 0; i < 8; i++) v[i] = i < channels ? load_half(from + i) : 0;
    store_shared16(to, {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16});
  }
}

template <class S> DEVICE void load_tile(const HaloParams& p, int index, uint32_t stage) {
  for_each_chunk<S>(p, tile_at(p, index), stage, [&](uint32_t to, const uint16_t* from, int channels) {
    fill_chunk(to, from, channels, p.x_bytes);
  });
}

// relu(x · scale + shift) on the chunks this thread copied itself, before the others see them; padding stays zero.
template <class S> DEVICE void apply_prologue(const HaloParams& p, const Tile& tile, uint32_t stage) {
  const int channel = thread_index() % S::CHUNKS * 8;
  const float* scales = p.in_scale + (int64_t)block_member() * p.C + channel;
  const float* shifts = p.in_shift + (int64_t)block_member() * p.C + channel;
  float scale[8], shift[8];
  UNROLL for (int i = 0; i < 8; i++) {
    scale[i] = channel + i < p.C ? load_float(scales + i) : 0.f;
    shift[i] = channel + i < p.C ? load_float(shifts + i) : 0.f;
  }
  for_each_chunk<S>(p, tile, stage, [&](uint32_t at, const uint16_t*, int channels) {
    if (channels == 0) return;
    const Vector4 v = load_shared16(at);
    uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
    UNROLL for (int i = 0; i < 4; i++) {
      float a, b;
      unpack<S::TYPE>(pairs[i], a, b);
      a = a * scale[2 * i] + shift[2 * i];
      b = b * scale[2 * i + 1] + shift[2 * i + 1];
      if (p.in_relu) {
        a = a < 0.f ? 0.f : a;  // NaN stays
        b = b < 0.f ? 0.f : b;
      }
      pairs[i] = pack<S::TYPE>(a, b);
    }
    store_shared16(at, {pairs[0], pairs[1], pairs[2], pairs[3]});
  });
}

// All nine taps of a member's weights, padded with zeros: OB rows of CI channels for each tap.
template <class S> DEVICE void load_weights(const HaloParams& p, uint32_t weights) {
  const uint16_t* weight = p.weight + (int64_t)block_member() * p.O * 9 * p.C;
  for (int i = thread_index(); i < 9 * S::OB * S::CHUNKS; i += p.warps * 32) {
    const int chunk = i % S::CHUNKS, row = i / S::CHUNKS, tap = row / S::OB, o = row % S::OB;
    const int left = o < p.O ? p.C - chunk * 8 : 0, channels = left < 0 ? 0 : left > 8 ? 8 : left;
    const uint16_t* from = channels > 0 ? weight + (o * 9 + tap) * p.C + chunk * 8 : weight;
    fill_chunk(weights + row * S::PIXEL + ((chunk ^ swizzle<S::PIXEL>(row)) << 4), from, channels, p.weight_bytes);
  }
}

// The matrices of 16 channels (two chunks from `chunk` on) of one tap, for all of the warp's output channels.
template <class S>
DEVICE void weight_matrices(uint32_t weights, int tap, int part, int chunk, uint32_t (&b)[2][S::NT]) {
  const int lane = thread_index() & 31, row = tap * S::OB + part * S::WARP_OB + (lane & 7);
  const int mine = (chunk + (lane >> 3 & 1)) ^ swizzle<S::PIXEL>(lane & 7);
  if constexpr (S::NT == 1) {
    load_matrix(weights + row * S::PIXEL + (mine << 4), b[0][0], b[1][0]);
  } else {
    UNROLL for (int j = 0; j < S::NT; j += 2) {
      const int at = row + (j + (lane >> 4)) * 8;
      load_matrix(weights + at * S::PIXEL + (mine << 4), b[0][j], b[1][j], b[0][j + 1], b[1][j + 1]);
    }
  }
}

// Weights that stay in registers: b[tap][chunk][j].
template <class S>
DEVICE void resident_weights(uint32_t weights, int part, uint32_t (&b)[9][S::CHUNKS][S::NT]) {
  UNROLL for (int tap = 0; tap < 9; tap++) {
    if constexpr (S::CHUNKS == 1) {
      const int row = tap * S::OB + part * S::WARP_OB + (thread_index() & 7);
      UNROLL for (int j = 0; j < S::NT; j++) load_matrix(weights + (row + j * 8) * S::PIXEL, b[tap][0][j]);
    } else {
      UNROLL for (int chunk = 0; chunk < S::CHUNKS; chunk += 2) {
        uint32_t two[2][S::NT];
        weight_matrices<S>(weights, tap, part, chunk, two);
        UNROLL for (int j = 0; j < S::NT; j++) {
          b[tap][chunk][j] = two[0][j];
          b[tap][chunk + 1][j] = two[1][j];
        }
      }
    }
  }
}

template <class S> using Sums = float[S::ROWS][S::NT][4];

// Calls f(output row, kernel row) for every output row that input row y touches.
template <class S, class F> DEVICE void for_each_output_row(int y, F f) {
  UNROLL for (int r = 0; r < 3; r++)
    if (y >= r && (y - r) % S::STRIDE == 0 && (y - r) / S::STRIDE < S::ROWS) f((y - r) / S::STRIDE, r);
}

// sums += the nine taps of the warp's pixels; `input` is its first input row in the stage.
template <class S>
DEVICE void multiply_taps(const HaloParams& p, uint32_t input, uint32_t weights, int part,
                          const uint32_t (&resident)[S::RESIDENT ? 9 : 1][S::CHUNKS][S::NT], Sums<S>& sums) {
  const int lane = thread_index() & 31, half = lane >> 4;  // matrices 2 and 3: the next chunk, or tap
  const int base = lane_column(p, lane & 15), pitch = p.pitch * S::PIXEL;
  const auto at_tap = [&](int s) { return S::STRIDE == 1 ? base + s : base + (s & 1) * p.half_pitch + (s >> 1); };
  if constexpr (S::CHUNKS == 1) {  // taps 0 and 1 of a kernel row are the 16 channels of one product, tap 2 is 8
    const uint32_t two = input + at_tap(half) * S::PIXEL, one = input + at_tap(2) * S::PIXEL;
    UNROLL for (int y = 0; y < S::INPUT_ROWS; y++) {
      uint32_t a[4], c[2];
      load_matrix(two + y * pitch, a[0], a[1], a[2], a[3]);
      load_matrix(one + y * pitch, c[0], c[1]);
      for_each_output_row<S>(y, [&](int m, int r) {
        UNROLL for (int j = 0; j < S::NT; j++) {
          multiply<S::TYPE>(sums[m][j], a, resident[3 * r][0][j], resident[3 * r + 1][0][j]);
          multiply<S::TYPE>(sums[m][j], c, resident[3 * r + 2][0][j]);
        }
      });
    }
  } else {
    const auto tap_column = [&](int s) {
      const int column = at_tap(s);
      const uint32_t first = input + column * S::PIXEL + ((half ^ swizzle<S::PIXEL>(column)) << 4);
      UNROLL for (int chunk = 0; chunk < S::CHUNKS; chunk += 2) {
        uint32_t b[3][2][S::NT];
        UNROLL for (int r = 0; r < 3; r++) {
          if constexpr (S::RESIDENT) {
            UNROLL for (int j = 0; j < S::NT; j++) {
              b[r][0][j] = resident[3 * r + s][chunk][j];
              b[r][1][j] = resident[3 * r + s][chunk + 1][j];
            }
          } else {
            weight_matrices<S>(weights, 3 * r + s, part, chunk, b[r]);
          }
        }
        UNROLL for (int y = 0; y < S::INPUT_ROWS; y++) {
          uint32_t a[4];
          load_matrix((first ^ chunk << 4) + y * pitch, a[0], a[1], a[2], a[3]);
          for_each_output_row<S>(y, [&](int m, int r) {
            UNROLL for (int j = 0; j < S::NT; j++) multiply<S::TYPE>(sums[m][j], a, b[r][0][j], b[r][1][j]);
          });
        }
      }
    };
    if constexpr (S::RESIDENT) {
      UNROLL for (int s = 0; s < 3; s++) tap_column(s);
    } else {
      NO_UNROLL for (int s = 0; s < 3; s++) tap_column(s);
    }
  }
}

// A warp's pixels: 4 rows times 16 lanes, of which a thread holds the sums of lanes `lane / 4` and 8 more.
struct Strip {
  int image, row, column;  // of its first pixel
};

DEVICE int strip_image(const HaloParams& p, const Strip& s, int lane) { return s.image + (lane >> p.log_columns); }
DEVICE int strip_column(const HaloParams& p, const Strip& s, int lane) { return s.column + (lane & (p.columns - 1)); }
DEVICE bool strip_inside(const HaloParams& p, const Strip& s, int lane) {
  return strip_image(p, s, lane) < p.N && strip_column(p, s, lane) < p.OW;
}

// f(sum, channel of it) for every sum of the thread, channels counted within the warp's.
template <class S, class F> DEVICE void for_each_sum(Sums<S>& sums, F f) {
  UNROLL for (int m = 0; m < S::ROWS; m++)
    UNROLL for (int j = 0; j < S::NT; j++)
      UNROLL for (int i = 0; i < 4; i++) f(sums[m][j][i], j, i & 1);
}

template <class S> using Channels = float[S::NT][2];

// The thread's channels of a (K, O) vector of float32; zeros beyond O.
template <class S> DEVICE void load_channels(const HaloParams& p, const float* vector, int channel, Channels<S>& v) {
  UNROLL for (int j = 0; j < S::NT; j++)
    UNROLL for (int e = 0; e < 2; e++) {
      const int o = channel + j * 8 + e;
      v[j][e] = o < p.O ? load_float(vector + (int64_t)block_member() * p.O + o) : 0.f;
    }
}

template <class S> DEVICE void add_bias(const HaloParams& p, int channel, Sums<S>& sums) {
  Channels<S> bias;
  if (p.bias_half) {
    const uint16_t* from = (const uint16_t*)p.bias + (int64_t)block_member() * p.O;
    UNROLL for (int j = 0; j < S::NT; j++) {
      const int o = channel + j * 8;
      const uint32_t low = o < p.O ? load_half(from + o) : 0, high = o + 1 < p.O ? load_half(from + o + 1) : 0;
      unpack<S::TYPE>(low | high << 16, bias[j][0], bias[j][1]);
    }
  } else {
    load_channels<S>(p, (const float*)p.bias, channel, bias);
  }
  for_each_sum<S>(sums, [&](float& sum, int j, int e) { sum += bias[j][e]; });
}

// Of the 8 threads that hold the same channels.
DEVICE float sum_over_pixels(float value) {
  value += shuffle_xor(value, 4);
  value += shuffle_xor(value, 8);
  return value + shuffle_xor(value, 16);
}

// Count, mean and Σ(y − mean)² of the warp's rounded pixels, for each of its channels: one of shared memory's
// (strips, 3, OB).
template <class S>
DEVICE void strip_moments(const HaloParams& p, const Strip& strip, uint32_t to, int column, const Sums<S>& sums) {
  const int lane = thread_index() & 31, rows = p.OH - strip.row;
  const bool inside[2] = {strip_inside(p, strip, lane >> 2), strip_inside(p, strip, (lane >> 2) + 8)};
  const int mine = (inside[0] + inside[1]) * (rows < 0 ? 0 : rows < S::ROWS ? rows : S::ROWS);
  const float count = sum_over_pixels((float)mine), share = count > 0.f ? 1.f / count : 0.f;
  UNROLL for (int j = 0; j < S::NT; j++) {
    float mean[2] = {0.f, 0.f}, squares[2] = {0.f, 0.f};
    const auto for_each_pixel = [&](auto f) {
      UNROLL for (int m = 0; m < S::ROWS; m++)
        UNROLL for (int h = 0; h < 2; h++) {
          float value[2];
          unpack<S::TYPE>(pack<S::TYPE>(sums[m][j][2 * h], sums[m][j][2 * h + 1]), value[0], value[1]);
          if (inside[h] && m < rows) f(value);
        }
    };
    for_each_pixel([&](const float (&value)[2]) {
      mean[0] += value[0];
      mean[1] += value[1];
    });
    UNROLL for (int e = 0; e < 2; e++) mean[e] = sum_over_pixels(mean[e]) * share;
    for_each_pixel([&](const float (&value)[2]) {
      UNROLL for (int e = 0; e < 2; e++) squares[e] += (value[e] - mean[e]) * (value[e] - mean[e]);
    });
    UNROLL for (int e = 0; e < 2; e++) {
      squares[e] = sum_over_pixels(squares[e]);
      if (lane < 4) {
        const uint32_t at = to + (column + j * 8 + e) * 4;
        store_shared4(at, bits_of(count));
        store_shared4(at + S::OB * 4, bits_of(mean[e]));
        store_shared4(at + 2 * S::OB * 4, bits_of(squares[e]));
      }
    }
  }
}

// The strips' moments joined in their order, one thread a channel: the tile's piece of moments (K, tiles, 3, O).
template <class S> DEVICE void tile_moments(const HaloParams& p, uint32_t from, int tile) {
  float* to = p.moments + ((int64_t)block_member() * p.tiles + tile) * 3 * p.O;
  for (int o = thread_index(); o < p.O; o += p.warps * 32) {
    float count = 0.f, mean = 0.f, squares = 0.f;
    for (int strip = 0; strip < p.warps / S::PARTS; strip++) {
      const uint32_t at = from + (strip * 3 * S::OB + o) * 4;
      const float more = float_of(load_shared4(at));
      if (more > 0.f) {
        const float off = float_of(load_shared4(at + S::OB * 4)) - mean, share = more / (count + more);
        squares += float_of(load_shared4(at + 2 * S::OB * 4)) + off * off * count * share;
        mean += off * share;
        count += more;
      }
    }
    store_float(to + o, count);
    store_float(to + p.O + o, mean);
    store_float(to + 2 * p.O + o, squares);
  }
}

template <class S>
DEVICE void add_residual(const HaloParams& p, const Strip& strip, int channel, Sums<S>& sums) {
  UNROLL for (int h = 0; h < 2; h++) {
    const int lane = ((thread_index() & 31) >> 2) + h * 8;
    const uint16_t* pixel = p.residual + block_member() * p.residual_stride[0] +
                            strip_image(p, strip, lane) * p.residual_stride[1] +
                            strip_column(p, strip, lane) * p.residual_stride[3];
    UNROLL for (int m = 0; m < S::ROWS; m++) {
      const bool inside = strip_inside(p, strip, lane) && strip.row + m < p.OH;
      const uint16_t* row = pixel + (strip.row + m) * p.residual_stride[2];
      UNROLL for (int j = 0; j < S::NT; j++) {
        const int o = channel + j * 8;
        uint32_t pair = 0;
        if (inside && o < p.O) {
          if (p.residual_pairs)
            pair = load_pair(row + o);
          else
            pair = load_half(row + o) | (o + 1 < p.O ? load_half(row + o + 1) << 16 : 0);
        }
        float low, high;
        unpack<S::TYPE>(pair, low, high);
        sums[m][j][2 * h] += low;
        sums[m][j][2 * h + 1] += high;
      }
    }
  }
}

// Rounds the sums into the warp's own shared memory, pixel by pixel, and stores whole chunks from there.
template <class S>
DEVICE void store_strip(const HaloParams& p, const Strip& strip, uint32_t output, int part, const Sums<S>& sums) {
  const int lane = thread_index() & 31;
  UNROLL for (int m = 0; m < S::ROWS; m++)
    UNROLL for (int h = 0; h < 2; h++) {
      const int pixel = m * 16 + h * 8 + (lane >> 2);
      UNROLL for (int j = 0; j < S::NT; j++)
        store_shared4(output + pixel * S::OUTPUT_PIXEL + ((j ^ swizzle<S::OUTPUT_PIXEL>(pixel)) << 4) + (lane & 3) * 4,
                      pack<S::TYPE>(sums[m][j][2 * h], sums[m][j][2 * h + 1]));
    }
  sync_warp();
  const int chunk = lane % S::NT, left = p.O - part * S::WARP_OB - chunk * 8;
  uint16_t* y = p.y + block_member() * p.y_stride[0] + part * S::WARP_OB + chunk * 8;
  UNROLL for (int i = 0; i < S::ROWS * 16 * S::NT; i += 32) {
    const int pixel = (i + lane) / S::NT, m = pixel >> 4, column = pixel & 15;
    if (left <= 0 || strip.row + m >= p.OH || !strip_inside(p, strip, column)) continue;
    const int mine = chunk ^ swizzle<S::OUTPUT_PIXEL>(pixel);
    const Vector4 v = load_shared16(output + pixel * S::OUTPUT_PIXEL + (mine << 4));
    uint16_t* to = y + strip_image(p, strip, column) * p.y_stride[1] + (strip.row + m) * p.y_stride[2] +
                   strip_column(p, strip, column) * p.y_stride[3];
    if (p.y_bytes == 16) {
      store16(to, v);
    } else if (p.y_bytes == 8) {
      store8(to, v.x, v.y);
      if (left > 4) store8(to + 4, v.z, v.w);
    } else {
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
      UNROLL for (int e = 0; e < 8; e++)
        if (e < left) store_half(to + e, pairs[e / 2] >> e % 2 * 16);
    }
  }
}

template <class S> KERNEL(S::THREADS, S::BLOCKS) halo_kernel(const GRID_CONSTANT HaloParams p) {
  const uint32_t base = shared_base(), weights = base + p.weights_at;
  const int lane = thread_index() & 31, warp = thread_index() >> 5;
  const int part = warp % S::PARTS, strip_index = warp / S::PARTS;
  const int group = strip_index / p.strips_per_image, strip_row = strip_index % p.strips_per_image * S::ROWS;
  const uint32_t input = (group * p.image_rows + strip_row * S::STRIDE) * p.pitch * S::PIXEL;
  const uint32_t output = base + p.output_at + warp * S::OUTPUT_BYTES;
  const int channel = part * S::WARP_OB + (lane & 3) * 2;

  load_weights<S>(p, weights);
  load_tile<S>(p, block_index(), base);
  uint32_t resident[S::RESIDENT ? 9 : 1][S::CHUNKS][S::NT];
  if constexpr (S::RESIDENT) {
    wait_copies();
    sync_block();
    resident_weights<S>(weights, part, resident);
  }

  uint32_t stage = 0;
  for (int index = block_index(); index < p.tiles; index += block_count()) {
    const Tile tile = tile_at(p, index);
    wait_copies();
    if (p.in_scale) apply_prologue<S>(p, tile, base + stage);
    sync_block();  // the tile is here for everyone, and everyone is done with the other stage
    if (index + block_count() < p.tiles) load_tile<S>(p, index + block_count(), base + (p.stage_bytes - stage));

    Sums<S> sums;
    for_each_sum<S>(sums, [](float& sum, int, int) { sum = 0.f; });
    multiply_taps<S>(p, base + stage + input, weights, part, resident, sums);

    const Strip strip = {tile.image + group * p.lane_images, tile.row + strip_row, tile.column};
    if (p.bias) add_bias<S>(p, channel, sums);
    if (p.moments) {
      const uint32_t moments = base + p.moments_at;
      strip_moments<S>(p, strip, moments + strip_index * 3 * S::OB * 4, channel, sums);
      sync_block();
      tile_moments<S>(p, moments, index);
    }
    if (p.scale) {
      Channels<S> scale, shift;
      load_channels<S>(p, p.scale, channel, scale);
      load_channels<S>(p, p.shift, channel, shift);
      for_each_sum<S>(sums, [&](float& sum, int j, int e) { sum = sum * scale[j][e] + shift[j][e]; });
    }
    if (p.residual) add_residual<S>(p, strip, channel, sums);
    if (p.relu) for_each_sum<S>(sums, [](float& sum, int, int) { sum = sum < 0.f ? 0.f : sum; });  // NaN stays
    store_strip<S>(p, strip, output, part, sums);
    stage = p.stage_bytes - stage;
  }
}
