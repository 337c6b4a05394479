// Picks the instantiation of the halo kernel, its grid and its shared memory. nvcc builds it for GPUs, g++ with
// -DHALO_EMULATION for the host.
#include "halo.cuh"

#include <string>

#ifndef HALO_EMULATION
#include <cuda_runtime.h>
#endif

namespace {

constexpr int STAGES = 2;
constexpr int LARGEST_SHARED_BYTES = 232448;  // of a CTA, on any architecture
constexpr char TOO_LARGE[] = "the tile does not fit into a processor's shared memory";

int inverse(int n) { return (1 << 16) / n + 1; }

// Fills in what the kernel derives from sizes and tile; null, or what is wrong with them.
template <class S> const char* plan(HaloParams& p) {
  p.log_columns = p.columns == 16 ? 4 : p.columns == 8 ? 3 : p.columns == 4 ? 2 : -1;
  if (p.log_columns < 0) return "a tile has 4, 8 or 16 columns";
  p.lane_images = 16 / p.columns;
  p.strips_per_image = p.rows / S::ROWS;
  const int groups = p.images / p.lane_images, strips = p.warps / S::PARTS;
  if (p.rows < 1 || p.rows % S::ROWS || groups < 1 || p.images % p.lane_images || p.warps % S::PARTS ||
      p.warps * 32 > S::THREADS || groups * p.strips_per_image != strips)
    return "the tile's pixels are not those of its warps";
  p.tiles_h = (p.OH + p.rows - 1) / p.rows;
  p.tiles_w = (p.OW + p.columns - 1) / p.columns;
  const int64_t tiles = (int64_t)((p.N + p.images - 1) / p.images) * p.tiles_h * p.tiles_w;
  if (tiles < 1 || tiles > INT32_MAX / 2 || p.K > 65535) return "more tiles or members than a grid has";
  p.tiles = (int)tiles;

  p.image_pitch = p.columns + 2;
  p.half_pitch = p.lane_images * p.image_pitch;
  p.pitch = S::STRIDE * p.half_pitch;
  p.image_rows = (p.rows - 1) * S::STRIDE + 3;
  p.stage_rows = groups * p.image_rows;
  p.inverse_image_pitch = inverse(p.image_pitch);
  p.inverse_pitch = inverse(p.pitch);
  p.inverse_image_rows = inverse(p.image_rows);
  const int step = p.warps * 32 / S::CHUNKS;
  p.step_rows = step / p.pitch;
  p.step_columns = step % p.pitch;

  const auto line = [](int bytes) { return (bytes + 127) / 128 * 128; };
  p.stage_bytes = line(p.stage_rows * p.pitch * S::PIXEL);
  p.weights_at = STAGES * p.stage_bytes;
  p.output_at = p.weights_at + line(9 * S::OB * S::PIXEL);
  p.moments_at = p.output_at + p.warps * S::OUTPUT_BYTES;
  p.shared_bytes = p.moments_at + (p.moments ? strips * 3 * S::OB * 4 : 0);
  return nullptr;
}

#ifdef HALO_EMULATION

template <class S> const char* run(const HaloParams& p, void*) {
  if (p.shared_bytes > LARGEST_SHARED_BYTES) return TOO_LARGE;
  const int width = p.tiles < 2 ? p.tiles : 2;  // few CTAs, so that each sees several tiles
  return emulation::launch(width, p.K, p.warps * 32, p.shared_bytes, [&p] { halo_kernel<S>(p); });
}

#else

// What went wrong, if anything did; the error is not left behind for whoever asks next.
const char* said(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// As many CTAs as are resident at once, shared out among the members: each keeps its member's weights.
template <class S> const char* run(const HaloParams& p, void* stream) {
  const auto kernel = halo_kernel<S>;
  int device, processors, resident;
  if (auto e = said(cudaGetDevice(&device))) return e;
  if (auto e = said(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))) return e;
  if (p.shared_bytes > LARGEST_SHARED_BYTES) return TOO_LARGE;
  const auto set = [&](cudaFuncAttribute what, int value) { return said(cudaFuncSetAttribute(kernel, what, value)); };
  if (auto e = set(cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes)) return e;
  if (auto e = set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)) return e;
  if (auto e = said(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, p.warps * 32, p.shared_bytes)))
    return e;
  if (resident == 0) return TOO_LARGE;
  const int share = resident * processors / p.K, width = share < 1 ? 1 : share < p.tiles ? share : p.tiles;
  kernel<<<dim3(width, p.K), p.warps * 32, p.shared_bytes, (cudaStream_t)stream>>>(p);
  return said(cudaGetLastError());
}

#endif

// CTAs a processor at least, which bounds the registers of a thread: as many as the compiler needs without spilling.
constexpr int blocks(int ci, int ob, int type) {
  return ob == 64 ? 1 : ob == 32 ? 3 : ci + ob == 16 ? 6 : ci == 16 && ob == 16 && type == HALO_FP16 ? 3 : 4;
}

template <int CI, int OB, int STRIDE, int TYPE> const char* planned(HaloParams p, void* stream) {
  using S = Halo<CI, OB, STRIDE, TYPE, blocks(CI, OB, TYPE)>;
  if (const char* wrong = plan<S>(p)) return wrong;
  return run<S>(p, stream);
}

template <int CI, int OB, int STRIDE> const char* typed(const HaloParams& p, void* stream) {
#ifdef HALO_EMULATION
  emulation::type = p.type;  // one instantiation serves both
  return planned<CI, OB, STRIDE, 0>(p, stream);
#else
  return p.type == HALO_BF16 ? planned<CI, OB, STRIDE, HALO_BF16>(p, stream)
                             : planned<CI, OB, STRIDE, HALO_FP16>(p, stream);
#endif
}

template <int CI, int OB> const char* strided(const HaloParams& p, void* stream) {
  return p.stride == 1 ? typed<CI, OB, 1>(p, stream) : typed<CI, OB, 2>(p, stream);
}

}  // namespace

const char* halo_launch(const HaloParams& p, void* stream) {
  if (p.C < 1 || p.C > 64 || p.O < 1 || p.O > 64) return "channels beyond 64";
  if (p.stride != 1 && p.stride != 2) return "a stride that is neither 1 nor 2";
  int ci, ob;
  halo_blocks(p.C, p.O, ci, ob);
  switch (ci * 100 + ob) {
    case 808: return strided<8, 8>(p, stream);
    case 816: return strided<8, 16>(p, stream);
    case 1608: return strided<16, 8>(p, stream);
    case 1616: return strided<16, 16>(p, stream);
    case 1632: return strided<16, 32>(p, stream);
    case 3216: return strided<32, 16>(p, stream);
    case 3232: return strided<32, 32>(p, stream);
    case 3264: return strided<32, 64>(p, stream);
    case 6432: return strided<64, 32>(p, stream);
    default: return strided<64, 64>(p, stream);
  }
}
