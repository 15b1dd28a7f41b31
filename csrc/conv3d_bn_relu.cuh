// y = relu(conv3d(x, weight) + bias + residual), an implicit GEMM on tensor cores over channels-last tensors:
// pixels (n, t, h, w) x output channels, reduced over (kernel tap, input channel). Accumulates in float32, adds bias
// and residual in float32 and rounds once. Bias, residual and relu are optional.
//
// Shared memory holds kStages slices of both operands, each row 64 bytes of the reduction: 4 chunks of 16 bytes, chunk
// c of row r at position c ^ (r / 2 % 4), so that the 8 rows of an ldmatrix touch each bank once. The reduction runs
// densely over taps x channels: with 8 channels a slice of 32 spans 4 taps, nothing is padded but the very end.
#pragma once

#include <climits>

#include "device/ptx.h"

namespace slowfast_ext {

// Sizes, and strides in elements.
struct Conv3dParameters {
  const void* x;
  const void* weight;    // (out_channels, kernel_t, kernel_h, kernel_w, in_channels), dense
  const float* bias;     // (out_channels) or null
  const void* residual;  // pixels of residual_pitch elements, or null
  void* y;               // pixels of y_pitch elements
  int64_t x_stride_n, x_stride_c, x_stride_t, x_stride_h, x_stride_w;
  int64_t residual_pitch, y_pitch;
  int in_channels, in_t, in_h, in_w;
  int out_channels, out_t, out_h, out_w;
  int kernel_t, kernel_h, kernel_w;
  int stride_t, stride_h, stride_w;
  int padding_t, padding_h, padding_w;
  int pixels;     // N * out_t * out_h * out_w
  int reduction;  // kernel_t * kernel_h * kernel_w * in_channels
  bool relu;
  bool paired;  // y and residual can be accessed two channels at a time
};

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether 16 bytes of x are always 16 aligned bytes of one pixel, and those of weight of one tap.
inline bool copies_in_chunks(const Conv3dParameters& p, int element_bytes) {
  const int chunk = 16 / element_bytes;
  return p.x_stride_c == 1 && p.in_channels % chunk == 0 && is_aligned(p.x, 16) && is_aligned(p.weight, 16) &&
         p.x_stride_n % chunk == 0 && p.x_stride_t % chunk == 0 && p.x_stride_h % chunk == 0 &&
         p.x_stride_w % chunk == 0;
}

inline bool stores_in_pairs(const Conv3dParameters& p, int element_bytes) {
  return p.y_pitch % 2 == 0 && is_aligned(p.y, 2 * element_bytes) && p.residual_pitch % 2 == 0 &&
         is_aligned(p.residual, 2 * element_bytes);
}

// How a 16 x 8 fragment grows by a 32-byte wide slice of the reduction.
template <typename Element_>
struct HalfMath {
  using Element = Element_;
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16(d, a, b, Element{});
  }
};

struct Tf32Math {
  using Element = float;
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t rounded_a[4], rounded_b[2];
    for (int i = 0; i < 4; ++i) rounded_a[i] = ptx::round_to_tf32(ptx::bits_to_float(a[i]));
    for (int i = 0; i < 2; ++i) rounded_b[i] = ptx::round_to_tf32(ptx::bits_to_float(b[i]));
    ptx::mma_m16n8k8_tf32(d, rounded_a, rounded_b);
  }
};

// Float32 out of tf32 tensor cores: each operand is the sum of two tf32 values (22 fraction bits), three of the four
// products are kept, the dropped one is 2^-22 of the result. An infinite operand gives NaN.
struct SplitTf32Math {
  using Element = float;
  static __device__ __forceinline__ void split(uint32_t value, uint32_t& high, uint32_t& low) {
    high = ptx::round_to_tf32(ptx::bits_to_float(value));
    low = ptx::round_to_tf32(ptx::bits_to_float(value) - ptx::bits_to_float(high));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    for (int i = 0; i < 4; ++i) split(a[i], high_a[i], low_a[i]);
    for (int i = 0; i < 2; ++i) split(b[i], high_b[i], low_b[i]);
    ptx::mma_m16n8k8_tf32(d, low_a, high_b);
    ptx::mma_m16n8k8_tf32(d, high_a, low_b);
    ptx::mma_m16n8k8_tf32(d, high_a, high_b);
  }
};

// A block's share of the output, and how its warps divide it.
template <int kPixels_, int kChannels_, int kWarpsAlongPixels, int kWarpsAlongChannels, int kStages_>
struct Tile {
  static constexpr int kPixels = kPixels_, kChannels = kChannels_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsAlongPixels * kWarpsAlongChannels;
  static constexpr int kWarpsChannels = kWarpsAlongChannels;
  static constexpr int kWarpPixels = kPixels / kWarpsAlongPixels, kWarpChannels = kChannels / kWarpsAlongChannels;
  static constexpr int kRowBytes = 64, kRowChunks = 4;
  static constexpr int kStageBytes = (kPixels + kChannels) * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // A thread fills one chunk column of every kThreads / 4 th row.
  static constexpr int kRowStep = kThreads / kRowChunks;
  static constexpr int kPixelRows = kPixels / kRowStep;
  static constexpr int kChannelRows = (kChannels + kRowStep - 1) / kRowStep;
  static_assert(kWarpPixels % 16 == 0 && kWarpChannels % 16 == 0, "a warp multiplies whole 16 x 16 fragments");
  static_assert(kPixels % kRowStep == 0, "every thread fills the same number of pixel rows");
  static_assert(kSharedBytes <= 48 * 1024, "what every GPU gives without asking");
};

// Walks the reduction: an input channel of a kernel tap, and its distance from the tap (0, 0, 0), channel 0.
struct ReductionCursor {
  int channel = 0, kernel_w = 0, kernel_h = 0, kernel_t = 0;
  int64_t offset = 0;

  __device__ __forceinline__ void advance(int channels, const Conv3dParameters& p) {
    channel += channels;
    offset += channels * p.x_stride_c;
    while (channel >= p.in_channels) {
      channel -= p.in_channels;
      offset += p.x_stride_w - p.in_channels * p.x_stride_c;
      if (++kernel_w < p.kernel_w) continue;
      kernel_w = 0;
      offset += p.x_stride_h - p.kernel_w * p.x_stride_w;
      if (++kernel_h < p.kernel_h) continue;
      kernel_h = 0;
      offset += p.x_stride_t - p.kernel_h * p.x_stride_h;
      ++kernel_t;
    }
  }
};

// The input seen by one output pixel: the corner of its window, which may lie outside.
template <typename Element>
struct InputWindow {
  const Element* corner;
  int t, h, w;

  InputWindow() = default;
  __device__ __forceinline__ InputWindow(int pixel, const Conv3dParameters& p) {
    if (pixel >= p.pixels) {
      corner = nullptr;
      t = h = w = INT_MIN / 2;  // contains nothing
      return;
    }
    w = pixel % p.out_w * p.stride_w - p.padding_w;
    pixel /= p.out_w;
    h = pixel % p.out_h * p.stride_h - p.padding_h;
    pixel /= p.out_h;
    t = pixel % p.out_t * p.stride_t - p.padding_t;
    const int64_t n = pixel / p.out_t;
    corner =
        static_cast<const Element*>(p.x) + n * p.x_stride_n + t * p.x_stride_t + h * p.x_stride_h + w * p.x_stride_w;
  }

  __device__ __forceinline__ bool contains(const ReductionCursor& at, const Conv3dParameters& p) const {
    return static_cast<unsigned>(t + at.kernel_t) < static_cast<unsigned>(p.in_t) &&
           static_cast<unsigned>(h + at.kernel_h) < static_cast<unsigned>(p.in_h) &&
           static_cast<unsigned>(w + at.kernel_w) < static_cast<unsigned>(p.in_w) && at.kernel_t < p.kernel_t;
  }
};

template <typename Tile>
__device__ __forceinline__ unsigned char* chunk_address(unsigned char* rows, int row, int chunk) {
  return rows + row * Tile::kRowBytes + ((chunk ^ (row / 2 % Tile::kRowChunks)) * 16);
}

// Fills one stage after another. With kVector a chunk is one asynchronous 16-byte copy (channels-last x, in_channels a
// multiple of a chunk, everything aligned); otherwise it is gathered element by element, from any strides.
template <typename Element, typename Tile, bool kVector>
class StageLoader {
 public:
  static constexpr int kChunk = 16 / sizeof(Element), kStep = Tile::kRowBytes / sizeof(Element);

  __device__ __forceinline__ StageLoader(const Conv3dParameters& p, int first_pixel, int first_channel)
      : p_(p),
        column_(threadIdx.x % Tile::kRowChunks),
        row_(threadIdx.x / Tile::kRowChunks),
        weight_k_(column_ * kChunk) {
#pragma unroll
    for (int i = 0; i < Tile::kPixelRows; ++i) {
      windows_[i] = InputWindow<Element>(first_pixel + row_ + i * Tile::kRowStep, p);
    }
    channel_ = first_channel + row_;
    at_.advance(column_ * kChunk, p);
  }

  __device__ __forceinline__ void load(unsigned char* stage) {
    unsigned char* weight_rows = stage + Tile::kPixels * Tile::kRowBytes;
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < Tile::kPixelRows; ++i) {
        ptx::cp_async_16(chunk_address<Tile>(stage, row_ + i * Tile::kRowStep, column_),
                         windows_[i].corner + at_.offset, windows_[i].contains(at_, p_));
      }
    } else {
      alignas(16) Element values[Tile::kPixelRows][kChunk];
      ReductionCursor at = at_;
#pragma unroll
      for (int element = 0; element < kChunk; ++element) {
#pragma unroll
        for (int i = 0; i < Tile::kPixelRows; ++i) {
          values[i][element] = windows_[i].contains(at, p_) ? windows_[i].corner[at.offset] : from_float<Element>(0.f);
        }
        at.advance(1, p_);
      }
#pragma unroll
      for (int i = 0; i < Tile::kPixelRows; ++i) {
        *reinterpret_cast<uint4*>(chunk_address<Tile>(stage, row_ + i * Tile::kRowStep, column_)) =
            *reinterpret_cast<const uint4*>(values[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kChannelRows; ++i)
      load_weight(weight_rows, row_ + i * Tile::kRowStep, i * Tile::kRowStep);
    at_.advance(kStep, p_);
    weight_k_ += kStep;
  }

 private:
  __device__ __forceinline__ void load_weight(unsigned char* rows, int row, int channel_step) {
    if (Tile::kChannels % Tile::kRowStep != 0 && row >= Tile::kChannels) return;
    const int channel = channel_ + channel_step;
    const Element* source = static_cast<const Element*>(p_.weight) + int64_t(channel) * p_.reduction + weight_k_;
    unsigned char* destination = chunk_address<Tile>(rows, row, column_);
    if constexpr (kVector) {
      ptx::cp_async_16(destination, source, channel < p_.out_channels && weight_k_ < p_.reduction);
    } else {
      alignas(16) Element values[kChunk];
#pragma unroll
      for (int element = 0; element < kChunk; ++element) {
        const bool valid = channel < p_.out_channels && weight_k_ + element < p_.reduction;
        values[element] = valid ? source[element] : from_float<Element>(0.f);
      }
      *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(values);
    }
  }

  const Conv3dParameters& p_;
  const int column_, row_;
  int channel_, weight_k_;
  ReductionCursor at_;
  InputWindow<Element> windows_[Tile::kPixelRows];
};

template <typename Element>
struct alignas(2 * sizeof(Element)) ElementPair {
  Element first, second;
};

// Bias, residual, relu and the one rounding, for the two neighbouring channels that a fragment row holds per thread.
template <typename Element>
__device__ __forceinline__ void store_pair(const Conv3dParameters& p, int pixel, int channel, float first,
                                           float second) {
  if (channel >= p.out_channels) return;
  const bool two = channel + 1 < p.out_channels, paired = two && p.paired;
  if (p.bias) {
    first += p.bias[channel];
    if (two) second += p.bias[channel + 1];
  }
  if (p.residual) {
    const Element* residual = static_cast<const Element*>(p.residual) + pixel * p.residual_pitch + channel;
    if (paired) {
      const ElementPair<Element> pair = *reinterpret_cast<const ElementPair<Element>*>(residual);
      first += to_float(pair.first);
      second += to_float(pair.second);
    } else {
      first += to_float(residual[0]);
      if (two) second += to_float(residual[1]);
    }
  }
  if (p.relu) {  // written so that NaN stays NaN
    first = first < 0.f ? 0.f : first;
    second = second < 0.f ? 0.f : second;
  }
  Element* y = static_cast<Element*>(p.y) + pixel * p.y_pitch + channel;
  if (paired) {
    *reinterpret_cast<ElementPair<Element>*>(y) = {from_float<Element>(first), from_float<Element>(second)};
  } else {
    y[0] = from_float<Element>(first);
    if (two) y[1] = from_float<Element>(second);
  }
}

template <typename Math, typename Tile, bool kVector>
__global__ void __launch_bounds__(Tile::kThreads) conv3d_bn_relu_kernel(const Conv3dParameters p) {
  using Element = typename Math::Element;
  using Loader = StageLoader<Element, Tile, kVector>;
  constexpr int kPixelFragments = Tile::kWarpPixels / 16, kChannelFragments = Tile::kWarpChannels / 8;
  SHARED_MEMORY(shared);

  // Blocks that share pixels are neighbours, so that x is read from memory once and then from L2.
  const int channel_tiles = (p.out_channels + Tile::kChannels - 1) / Tile::kChannels;
  const int first_pixel = blockIdx.x / channel_tiles * Tile::kPixels;
  const int first_channel = blockIdx.x % channel_tiles * Tile::kChannels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_pixel = warp / Tile::kWarpsChannels * Tile::kWarpPixels;
  const int warp_channel = warp % Tile::kWarpsChannels * Tile::kWarpChannels;

  Loader loader(p, first_pixel, first_channel);
  const int steps = (p.reduction + Loader::kStep - 1) / Loader::kStep;
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) loader.load(shared + step * Tile::kStageBytes);
    ptx::cp_async_commit();
  }

  float sum[kPixelFragments][kChannelFragments][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this step has landed for all, and all are done with the stage that is refilled next
    if (step + Tile::kStages - 1 < steps) {
      loader.load(shared + (step + Tile::kStages - 1) % Tile::kStages * Tile::kStageBytes);
    }
    ptx::cp_async_commit();

    unsigned char* pixel_rows = shared + step % Tile::kStages * Tile::kStageBytes;
    unsigned char* channel_rows = pixel_rows + Tile::kPixels * Tile::kRowBytes;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kRowChunks; chunk += 2) {
      uint32_t a[kPixelFragments][4], b[kChannelFragments / 2][4];
#pragma unroll
      for (int i = 0; i < kPixelFragments; ++i) {
        ptx::ldmatrix_x4(a[i], chunk_address<Tile>(pixel_rows, warp_pixel + i * 16 + lane % 16, chunk + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kChannelFragments / 2; ++j) {
        const int row = warp_channel + j * 16 + lane % 8 + lane / 16 * 8;
        ptx::ldmatrix_x4(b[j], chunk_address<Tile>(channel_rows, row, chunk + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kPixelFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kChannelFragments; ++j) {
          const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          Math::multiply(sum[i][j], a[i], column);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kPixelFragments; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = first_pixel + warp_pixel + i * 16 + half * 8 + lane / 4;
      if (pixel >= p.pixels) continue;
#pragma unroll
      for (int j = 0; j < kChannelFragments; ++j) {
        store_pair<Element>(p, pixel, first_channel + warp_channel + j * 8 + lane % 4 * 2, sum[i][j][half * 2],
                            sum[i][j][half * 2 + 1]);
      }
    }
  }
}

enum class TileShape { kAuto, k128x128, k64x64, k128x32, k128x16 };

// Narrow tiles for the narrow layers of the Fast pathway; for the others the largest that still gives every
// multiprocessor a tile.
inline TileShape choose_tile(const Conv3dParameters& p, bool vector, int multiprocessors) {
  if (p.out_channels <= 16) return TileShape::k128x16;
  if (!vector) return TileShape::k64x64;
  if (p.out_channels <= 32) return TileShape::k128x32;
  const int64_t large_tiles = (int64_t(p.pixels) + 127) / 128 * ((p.out_channels + 127) / 128);
  return p.out_channels > 64 && large_tiles >= multiprocessors ? TileShape::k128x128 : TileShape::k64x64;
}

template <typename Math, typename Tile, bool kVector>
void launch_conv3d_bn_relu_tile(const Conv3dParameters& p, cudaStream_t stream) {
  const unsigned blocks = (unsigned(p.pixels) + Tile::kPixels - 1) / Tile::kPixels *
                          ((p.out_channels + Tile::kChannels - 1) / Tile::kChannels);
  launch_kernel(conv3d_bn_relu_kernel<Math, Tile, kVector>, blocks, Tile::kThreads, Tile::kSharedBytes, stream, p);
}

template <typename Math>
void launch_conv3d_bn_relu(const Conv3dParameters& p, TileShape tile, int multiprocessors, cudaStream_t stream) {
  using Large = Tile<128, 128, 2, 4, 3>;
  using Medium = Tile<64, 64, 2, 2, 4>;
  using Narrow = Tile<128, 32, 4, 1, 4>;
  using Thin = Tile<128, 16, 4, 1, 4>;
  const bool vector = copies_in_chunks(p, sizeof(typename Math::Element));
  if (tile == TileShape::kAuto) tile = choose_tile(p, vector, multiprocessors);
  if (!vector) {
    if (tile == TileShape::k128x16) return launch_conv3d_bn_relu_tile<Math, Thin, false>(p, stream);
    return launch_conv3d_bn_relu_tile<Math, Medium, false>(p, stream);
  }
  switch (tile) {
    case TileShape::k128x128:
      return launch_conv3d_bn_relu_tile<Math, Large, true>(p, stream);
    case TileShape::k128x32:
      return launch_conv3d_bn_relu_tile<Math, Narrow, true>(p, stream);
    case TileShape::k128x16:
      return launch_conv3d_bn_relu_tile<Math, Thin, true>(p, stream);
    default:
      return launch_conv3d_bn_relu_tile<Math, Medium, true>(p, stream);
  }
}

}  // namespace slowfast_ext
