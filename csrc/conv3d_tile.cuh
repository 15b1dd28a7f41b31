// The convolutions of conv3d_bn_relu and conv3d_bn_relu_pair: y = relu(conv3d(x, weight) + bias + residual), an
// implicit GEMM on tensor cores over channels-last tensors: pixels (n, t, h, w) x output channels, reduced over (kernel
// tap, input channel). Accumulates in float32, adds bias and residual in float32 and rounds once. Bias, residual and
// relu are optional.
//
// Shared memory holds kStages slices of both operands, each row 64 bytes of the reduction: 4 chunks of 16 bytes, chunk
// c of row r at position c ^ (r / 2 % 4), so that the 8 rows of an ldmatrix touch each bank once. The reduction runs
// densely over taps x channels: with 8 channels a slice of 32 spans 4 taps, nothing is padded but the very end.
#pragma once

#include <climits>

#include "device/math.cuh"

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
  bool wide;       // y and residual can be accessed 16 bytes at a time
  int splits;      // blocks that share a tile's reduction
  float* partial;  // with several splits: their sums, (splits, pixels, partial_pitch)
  int partial_pitch;
};

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether 16 bytes of x are always 16 aligned bytes of one pixel, and those of weight of one tap.
inline bool copies_in_chunks(const Conv3dParameters& p, int element_bytes) {
  const int chunk = 16 / element_bytes;
  return p.x_stride_c == 1 && p.in_channels % chunk == 0 && is_aligned(p.x, 16) && is_aligned(p.weight, 16) &&
         p.x_stride_n % chunk == 0 && p.x_stride_t % chunk == 0 && p.x_stride_h % chunk == 0 &&
         p.x_stride_w % chunk == 0;
}

// Whether 8 channels of y and residual, from a multiple of 8 on, are always aligned to 16 bytes.
inline bool is_wide(const Conv3dParameters& p, int element_bytes) {
  const int chunk = 16 / element_bytes;
  return p.y_pitch % chunk == 0 && is_aligned(p.y, 16) && p.residual_pitch % chunk == 0 && is_aligned(p.residual, 16);
}

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
  // In the epilogue each warp turns 16 pixels x kWarpChannels sums around in shared memory, rows 8 floats apart.
  static constexpr int kSlabPitch = kWarpChannels + 8;
  static constexpr int kSlabBytes = kThreads / 32 * 16 * kSlabPitch * int(sizeof(float));
  static_assert(kSlabBytes <= kSharedBytes, "the sums reuse the stages");
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

  __device__ __forceinline__ StageLoader(const Conv3dParameters& p, int first_pixel, int first_channel, int first_step)
      : p_(p),
        column_(threadIdx.x % Tile::kRowChunks),
        row_(threadIdx.x / Tile::kRowChunks),
        weight_k_(first_step * kStep + column_ * kChunk) {
#pragma unroll
    for (int i = 0; i < Tile::kPixelRows; ++i) {
      windows_[i] = InputWindow<Element>(first_pixel + row_ + i * Tile::kRowStep, p);
    }
    channel_ = first_channel + row_;
    at_.advance(weight_k_, p);
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

// 8 channels of a pixel.
constexpr int kOutputChunk = 8;

// Bias, residual and relu, unless kBare says that there are none, and the one rounding.
template <typename Element, bool kBare = false>
__device__ __forceinline__ void store_chunk(const Conv3dParameters& p, int pixel, int channel,
                                            float (&sum)[kOutputChunk]) {
  const int channels = p.out_channels - channel;  // that exist, from this one on
  const bool wide = p.wide && channels >= kOutputChunk;
  alignas(16) Element values[kOutputChunk];
  constexpr int kPieces = sizeof(values) / 16;
  if (!kBare && p.bias) {
#pragma unroll
    for (int i = 0; i < kOutputChunk; ++i) sum[i] += i < channels ? p.bias[channel + i] : 0.f;
  }
  if (!kBare && p.residual) {
    const Element* residual = static_cast<const Element*>(p.residual) + pixel * p.residual_pitch + channel;
    if (wide) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(residual)[i];
      }
#pragma unroll
      for (int i = 0; i < kOutputChunk; ++i) sum[i] += to_float(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kOutputChunk; ++i) sum[i] += i < channels ? to_float(residual[i]) : 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < kOutputChunk; ++i) {
    if (!kBare && p.relu) sum[i] = sum[i] < 0.f ? 0.f : sum[i];  // written so that NaN stays NaN
    values[i] = from_float<Element>(sum[i]);
  }
  Element* y = static_cast<Element*>(p.y) + pixel * p.y_pitch + channel;
  if (wide) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(y)[i] = reinterpret_cast<const uint4*>(values)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kOutputChunk; ++i) {
      if (i < channels) y[i] = values[i];
    }
  }
}

// Blocks that a multiprocessor holds at once: as many as fit without spilling registers.
template <typename Math, typename Tile>
constexpr int kResidentBlocks = Tile::kThreads == 128                 ? 3
                                : sizeof(typename Math::Element) == 2 ? 2
                                                                      : 1;

// For convolve_tile: outputs are stored, and that is all.
struct NoMoments {
  static constexpr bool kWanted = false;
};

// One block's share of a convolution: `block` counts the splits of a tile, then the tiles of the same pixels, so that
// neighbours share pixels and x is read from memory once and then from L2. Where moments of the outputs are wanted, of
// the type TileMoments, there are neither splits nor bias, residual and relu.
template <typename Math, typename Tile, bool kVector, typename Moments = NoMoments>
__device__ __forceinline__ void convolve_tile(const Conv3dParameters& p, unsigned block, Moments moments = {}) {
  using Element = typename Math::Element;
  using Loader = StageLoader<Element, Tile, kVector>;
  constexpr int kPixelFragments = Tile::kWarpPixels / 16, kChannelFragments = Tile::kWarpChannels / 8;
  constexpr bool kMoments = Moments::kWanted;
  SHARED_MEMORY(shared);

  const int channel_tiles = (p.out_channels + Tile::kChannels - 1) / Tile::kChannels;
  const int splits = kMoments ? 1 : p.splits, split = block % splits, tile = block / splits;
  const int first_pixel = tile / channel_tiles * Tile::kPixels;
  const int first_channel = tile % channel_tiles * Tile::kChannels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_pixel = warp / Tile::kWarpsChannels * Tile::kWarpPixels;
  const int warp_channel = warp % Tile::kWarpsChannels * Tile::kWarpChannels;

  const int all_steps = (p.reduction + Loader::kStep - 1) / Loader::kStep;
  const int first_step = int64_t(all_steps) * split / splits;
  const int steps = int64_t(all_steps) * (split + 1) / splits - first_step;
  Loader loader(p, first_pixel, first_channel, first_step);
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

  __syncthreads();  // all have read the last stage, the sums go where the stages were
  if constexpr (kMoments) {
    moments.template add<Element, Tile>(sum, warp_pixel, warp_channel, p.pixels - first_pixel, shared);
  }
  float* slab = reinterpret_cast<float*>(shared) + warp * 16 * Tile::kSlabPitch;
  constexpr int kRowChunks = Tile::kWarpChannels / kOutputChunk, kRowsAtOnce = 32 / kRowChunks;
  const int chunk = lane % kRowChunks;
#pragma unroll
  for (int i = 0; i < kPixelFragments; ++i) {
#pragma unroll
    for (int j = 0; j < kChannelFragments; ++j) {
      float* corner = slab + lane / 4 * Tile::kSlabPitch + j * 8 + lane % 4 * 2;
      *reinterpret_cast<ElementPair<float>*>(corner) = {sum[i][j][0], sum[i][j][1]};
      *reinterpret_cast<ElementPair<float>*>(corner + 8 * Tile::kSlabPitch) = {sum[i][j][2], sum[i][j][3]};
    }
    __syncwarp();
#pragma unroll
    for (int first = 0; first < 16; first += kRowsAtOnce) {
      const int row = first + lane / kRowChunks;
      const int pixel = first_pixel + warp_pixel + i * 16 + row;
      const int channel = first_channel + warp_channel + chunk * kOutputChunk;
      alignas(16) float values[kOutputChunk];
      // Odd rows begin with their second half, so that 8 lanes meet each bank once.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int part = half ^ (row & 1);
        const uint4 four =
            *reinterpret_cast<const uint4*>(slab + row * Tile::kSlabPitch + chunk * kOutputChunk + part * 4);
        values[half * 4] = ptx::bits_to_float(four.x);
        values[half * 4 + 1] = ptx::bits_to_float(four.y);
        values[half * 4 + 2] = ptx::bits_to_float(four.z);
        values[half * 4 + 3] = ptx::bits_to_float(four.w);
      }
      if (row & 1) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float swapped = values[k];
          values[k] = values[k + 4];
          values[k + 4] = swapped;
        }
      }
      if (pixel >= p.pixels || channel >= p.out_channels) continue;
      if (kMoments || p.splits == 1) {
        store_chunk<Element, kMoments>(p, pixel, channel, values);
      } else {
        float* partial = p.partial + (int64_t(split) * p.pixels + pixel) * p.partial_pitch + channel;
        reinterpret_cast<uint4*>(partial)[0] = reinterpret_cast<const uint4*>(values)[0];
        reinterpret_cast<uint4*>(partial)[1] = reinterpret_cast<const uint4*>(values)[1];
      }
    }
    __syncwarp();
  }
  if constexpr (kMoments) {
    moments.template store<Tile>(tile / channel_tiles, first_channel, p.out_channels, p.pixels - first_pixel, shared);
  }
}

// Adds what the splits of the reduction found, in their order, so that the result is the same each time.
// A thread adds kOutputChunk channels of a pixel.
template <typename Element>
__device__ __forceinline__ void reduce_splits(const Conv3dParameters& p, int64_t index) {
  const int chunks = p.partial_pitch / kOutputChunk;
  if (index >= int64_t(p.pixels) * chunks) return;
  const int pixel = index / chunks, channel = index % chunks * kOutputChunk;
  float sum[kOutputChunk] = {};
  for (int split = 0; split < p.splits; ++split) {
    const float* partial = p.partial + (int64_t(split) * p.pixels + pixel) * p.partial_pitch + channel;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = reinterpret_cast<const uint4*>(partial)[half];
      sum[half * 4] += ptx::bits_to_float(four.x);
      sum[half * 4 + 1] += ptx::bits_to_float(four.y);
      sum[half * 4 + 2] += ptx::bits_to_float(four.z);
      sum[half * 4 + 3] += ptx::bits_to_float(four.w);
    }
  }
  store_chunk<Element>(p, pixel, channel, sum);
}

}  // namespace slowfast_ext
