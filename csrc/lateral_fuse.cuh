// y = relu(conv(fast, weight) + bias), a k x 1 x 1 convolution with a stride in time, on tensor cores, written into the
// channels behind those of slow; slow itself is copied in front of them by the same launch, unless it is there already.
//
// A tile is 128 pixels of one frame of y: its operand is, for each tap, 128 pixels in a row of one frame of fast. A
// block takes one tile after another and keeps the weights of its channels in shared memory where they fit, else it
// streams them with the pixels. Pixels arrive in a ring of stages as in conv3d_bn_relu.cuh, rows of 64 swizzled bytes
// of the reduction over (tap, channel); the next tile is under way while a warp passes its results through shared
// memory of its own, to store 16 bytes a lane. Neighbouring blocks take neighbouring frames of y, whose taps overlap in
// L2.
//
// Bytes a pixel of y in 16 bits, without slow, R50 4x16 (5 taps, stride 8) | R50 8x8 (7 taps, stride 4; of overlapping
// frames DRAM gives each once): 112 | 96 for 8 channels, 448 | 384 for 32, 896 | 768 for 64, 1792 | 1536 for 128. These
// are the floor; weights add 1.3 to 459 KB a launch. Arithmetic with mma.sync takes, on an H200, 0.1 | 0.2, 0.4 | 0.7,
// 0.8 | 1.3 and 1.6 | 2.6 of that time.
#pragma once

#include "conv3d_bn_relu.cuh"

namespace slowfast_ext {

// All pixels are channels-last and one pitch (in elements) apart; slow_y and y share theirs.
struct LateralParameters {
  const void* fast;    // (batch, in_frames, area) pixels of in_channels
  const void* weight;  // (out_channels, taps, in_channels), dense
  const float* bias;   // (out_channels) or null
  const void* slow;    // (batch, out_frames, area) pixels of slow_channels, or null
  void* slow_y;        // where slow goes
  void* y;             // (batch, out_frames, area) pixels of out_channels
  int64_t fast_pitch, slow_pitch, y_pitch;
  int batch, area, in_frames, out_frames;
  int in_channels, out_channels, slow_channels;
  int taps, stride, padding;
  bool relu;

  __host__ __device__ int reduction() const { return taps * in_channels; }
};

constexpr int kLateralPixels = 128;  // of a tile

template <typename Math, int kChannels_, int kWarpsAlongPixels, int kWarpsAlongChannels, bool kResident_, bool kVector_>
struct LateralTile {
  using Element = typename Math::Element;
  static constexpr bool kResident = kResident_, kVector = kVector_;
  static constexpr int kPixels = kLateralPixels, kChannels = kChannels_, kStages = 5;
  static constexpr int kWarps = kWarpsAlongPixels * kWarpsAlongChannels, kThreads = 32 * kWarps;
  static constexpr int kWarpsChannels = kWarpsAlongChannels;
  static constexpr int kWarpPixels = kPixels / kWarpsAlongPixels, kWarpChannels = kChannels / kWarpsAlongChannels;
  static constexpr int kRowBytes = 64, kRowChunks = 4, kChunk = 16 / sizeof(Element), kStep = 64 / sizeof(Element);
  static constexpr int kRowStep = kThreads / kRowChunks;  // a thread fills one chunk column of every so many-th row
  static constexpr int kPixelBytes = kPixels * kRowBytes, kWeightBytes = kChannels * kRowBytes;
  // Blocks that a multiprocessor should run at once, as far as registers allow without spilling.
  static constexpr bool kSpare = sizeof(Element) == 4 ? kChannels < 128 : kChannels == 64 && !kResident && !kVector;
  static constexpr int kBlocks = (kChannels == 16 ? 3 : kChannels == 64 ? 2 : 1) - kSpare;
  // 16 bytes more than the values, so that the 8 rows that a warp writes at once start in different banks.
  static constexpr int kOutputPitch = kWarpChannels * sizeof(Element) + 16;
  static constexpr int kOutputBytes = kWarps * kWarpPixels * kOutputPitch;
  static_assert(kWarpPixels % 16 == 0 && kWarpChannels % 16 == 0, "a warp multiplies whole 16 x 16 fragments");
  static_assert(kPixels % kRowStep == 0, "every thread fills the same number of pixel rows");

  static __host__ __device__ int steps(const LateralParameters& p) { return (p.reduction() + kStep - 1) / kStep; }
  static __host__ __device__ int channel_tiles(const LateralParameters& p) {
    return (p.out_channels + kChannels - 1) / kChannels;
  }
  static __host__ __device__ int plane_tiles(const LateralParameters& p) { return (p.area + kPixels - 1) / kPixels; }
  static __host__ __device__ int tiles(const LateralParameters& p) { return p.batch * p.out_frames * plane_tiles(p); }
  static int64_t shared_bytes(const LateralParameters& p) {
    return int64_t(kStages) * kPixelBytes + int64_t(kResident ? steps(p) : kStages) * kWeightBytes + kOutputBytes;
  }
};

// The pixels of a tile: from `pixel` on, in one frame of y.
struct LateralPosition {
  int clip, frame, pixel;

  __device__ __forceinline__ LateralPosition(int tile, int plane_tiles, const LateralParameters& p)
      : clip(tile / p.out_frames / plane_tiles),
        frame(tile % p.out_frames),
        pixel(tile / p.out_frames % plane_tiles * kLateralPixels) {}
};

// Fills one stage after another, tile after tile, without a division between tiles.
template <typename Tile>
class LateralLoader {
 public:
  using Element = typename Tile::Element;

  __device__ __forceinline__ LateralLoader(const LateralParameters& p, unsigned char* pixels, unsigned char* weights,
                                           int first_channel, int first_tile, int tile_step)
      : p_(p),
        pixels_(pixels),
        weights_(weights),
        column_(threadIdx.x % Tile::kRowChunks),
        row_(threadIdx.x / Tile::kRowChunks),
        out_channel_(first_channel + row_),
        tile_(first_tile),
        tile_step_(tile_step),
        first_tile_(first_tile),
        steps_(Tile::steps(p)),
        step_taps_(Tile::kStep / p.in_channels),
        step_channels_(Tile::kStep % p.in_channels) {
    start_tile();
  }

  // Of nothing, behind the last tile.
  __device__ __forceinline__ void load_next() {
    if (tile_ >= Tile::tiles(p_)) return;
    unsigned char* rows = pixels_ + slot_ * Tile::kPixelBytes;
#pragma unroll
    for (int i = 0; i < Tile::kPixels / Tile::kRowStep; ++i) load_pixel(rows, row_ + i * Tile::kRowStep);
    if (!Tile::kResident || tile_ == first_tile_) {
      rows = weights_ + (Tile::kResident ? step_ : slot_) * Tile::kWeightBytes;
#pragma unroll
      for (int i = 0; i < (Tile::kChannels + Tile::kRowStep - 1) / Tile::kRowStep; ++i) {
        const int row = row_ + i * Tile::kRowStep;
        if (row < Tile::kChannels) load_weight(rows, row, out_channel_ + i * Tile::kRowStep);
      }
    }
    slot_ = slot_ + 1 < Tile::kStages ? slot_ + 1 : 0;
    tap_ += step_taps_;
    channel_ += step_channels_;
    if (channel_ >= p_.in_channels) {
      channel_ -= p_.in_channels;
      ++tap_;
    }
    if (++step_ < steps_) return;
    tile_ += tile_step_;
    start_tile();
  }

 private:
  __device__ __forceinline__ void start_tile() {
    const LateralPosition at(tile_, Tile::plane_tiles(p_), p_);
    step_ = 0;
    tap_ = column_ * Tile::kChunk / p_.in_channels;
    channel_ = column_ * Tile::kChunk % p_.in_channels;
    first_pixel_ = at.pixel;
    first_frame_ = at.frame * p_.stride - p_.padding;
    offset_ = (int64_t(at.clip) * p_.in_frames + first_frame_) * p_.area + at.pixel;
  }

  // Whether a tap of the frame is there: it may lie before the first or behind the last one, or be no tap any more.
  __device__ __forceinline__ bool has_frame(int tap) const {
    return tap < p_.taps && static_cast<unsigned>(first_frame_ + tap) < static_cast<unsigned>(p_.in_frames);
  }

  __device__ __forceinline__ const Element* source(int row, int tap, int channel) const {
    const int64_t pixel = offset_ + int64_t(tap) * p_.area + row;
    return static_cast<const Element*>(p_.fast) + pixel * p_.fast_pitch + channel;
  }

  __device__ __forceinline__ void load_pixel(unsigned char* rows, int row) {
    unsigned char* destination = chunk_address<Tile>(rows, row, column_);
    const bool has_pixel = first_pixel_ + row < p_.area;
    if constexpr (Tile::kVector) {
      ptx::cp_async_16(destination, source(row, tap_, channel_), has_pixel && has_frame(tap_));
    } else {
      alignas(16) Element values[Tile::kChunk];
      int tap = tap_, channel = channel_;
#pragma unroll
      for (int i = 0; i < Tile::kChunk; ++i) {
        values[i] = has_pixel && has_frame(tap) ? *source(row, tap, channel) : from_float<Element>(0.f);
        if (++channel < p_.in_channels) continue;
        channel = 0;
        ++tap;
      }
      *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(values);
    }
  }

  __device__ __forceinline__ void load_weight(unsigned char* rows, int row, int out_channel) {
    unsigned char* destination = chunk_address<Tile>(rows, row, column_);
    const int k = step_ * Tile::kStep + column_ * Tile::kChunk;
    const Element* source = static_cast<const Element*>(p_.weight) + int64_t(out_channel) * p_.reduction() + k;
    if constexpr (Tile::kVector) {
      ptx::cp_async_16(destination, source, out_channel < p_.out_channels && k < p_.reduction());
    } else {
      alignas(16) Element values[Tile::kChunk];
#pragma unroll
      for (int i = 0; i < Tile::kChunk; ++i) {
        const bool valid = out_channel < p_.out_channels && k + i < p_.reduction();
        values[i] = valid ? source[i] : from_float<Element>(0.f);
      }
      *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(values);
    }
  }

  const LateralParameters& p_;
  unsigned char *pixels_, *weights_;
  const int column_, row_, out_channel_;
  int tile_;
  const int tile_step_, first_tile_, steps_, step_taps_, step_channels_;
  int slot_ = 0, step_, tap_, channel_, first_pixel_, first_frame_;
  int64_t offset_;
};

// Copies the pixels of a tile from slow to its slice, in words of 16 bytes or of one element.
template <typename Word, typename Tile>
__device__ __forceinline__ void copy_slow(const LateralParameters& p, const LateralPosition& at) {
  using Element = typename Tile::Element;
  constexpr int kUnroll = 4, kWordElements = sizeof(Word) / sizeof(Element);
  const int64_t first = (int64_t(at.clip) * p.out_frames + at.frame) * p.area + at.pixel;
  const Element* source = static_cast<const Element*>(p.slow) + first * p.slow_pitch;
  Element* destination = static_cast<Element*>(p.slow_y) + first * p.y_pitch;
  const int words = p.slow_channels / kWordElements, pixels = min(Tile::kPixels, p.area - at.pixel);
  const int step_pixels = Tile::kThreads / words, step_words = Tile::kThreads % words;
  int pixel = threadIdx.x / words, word = threadIdx.x % words;
  while (pixel < pixels) {
    Word values[kUnroll];
    int to[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      to[i] = -1;
      if (pixel < pixels) {
        values[i] = *reinterpret_cast<const Word*>(source + pixel * p.slow_pitch + word * kWordElements);
        to[i] = pixel * static_cast<int>(p.y_pitch) + word * kWordElements;
      }
      pixel += step_pixels;
      word += step_words;
      if (word >= words) {
        word -= words;
        ++pixel;
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (to[i] >= 0) *reinterpret_cast<Word*>(destination + to[i]) = values[i];
    }
  }
}

// Whether 16 bytes of each of these pixels are always aligned.
inline bool has_chunks(const void* pixels, int64_t pitch, int channels, int element_bytes) {
  return is_aligned(pixels, 16) && pitch * element_bytes % 16 == 0 && channels * element_bytes % 16 == 0;
}

template <typename Math, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    lateral_fuse_kernel(const LateralParameters p, bool y_in_chunks, bool slow_in_chunks) {
  using Element = typename Math::Element;
  constexpr int kPixelFragments = Tile::kWarpPixels / 16, kChannelFragments = Tile::kWarpChannels / 8;
  SHARED_MEMORY(shared);

  const int steps = Tile::steps(p), channel_tiles = Tile::channel_tiles(p);
  unsigned char* pixels = shared;
  unsigned char* output = pixels + Tile::kStages * Tile::kPixelBytes;
  unsigned char* weights = output + Tile::kOutputBytes;
  const int first_channel = blockIdx.x % channel_tiles * Tile::kChannels;
  const int first_tile = blockIdx.x / channel_tiles, tile_step = gridDim.x / channel_tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_pixel = warp / Tile::kWarpsChannels * Tile::kWarpPixels;
  const int warp_channel = warp % Tile::kWarpsChannels * Tile::kWarpChannels;
  output += warp * Tile::kWarpPixels * Tile::kOutputPitch;

  LateralLoader<Tile> loader(p, pixels, weights, first_channel, first_tile, tile_step);
  for (int i = 0; i < Tile::kStages - 1; ++i) {
    loader.load_next();
    ptx::cp_async_commit();
  }
  int slot = 0;
  for (int tile = first_tile; tile < Tile::tiles(p); tile += tile_step) {
    float sum[kPixelFragments][kChannelFragments][4] = {};
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<Tile::kStages - 2>();
      __syncthreads();  // this step has landed for all, and all are done with the stage that is refilled next
      loader.load_next();
      ptx::cp_async_commit();

      unsigned char* pixel_rows = pixels + slot * Tile::kPixelBytes;
      unsigned char* channel_rows = weights + (Tile::kResident ? step : slot) * Tile::kWeightBytes;
      slot = slot + 1 < Tile::kStages ? slot + 1 : 0;
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

    // Bias, ReLU and the one rounding; then from the layout of the sums to rows of 16-byte chunks, within the warp.
    const LateralPosition at(tile, Tile::plane_tiles(p), p);
#pragma unroll
    for (int j = 0; j < kChannelFragments; ++j) {
      const int column = j * 8 + lane % 4 * 2, channel = first_channel + warp_channel + column;
      const float first_bias = p.bias && channel < p.out_channels ? p.bias[channel] : 0.f;
      const float second_bias = p.bias && channel + 1 < p.out_channels ? p.bias[channel + 1] : 0.f;
#pragma unroll
      for (int i = 0; i < kPixelFragments; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float first = sum[i][j][half * 2] + first_bias, second = sum[i][j][half * 2 + 1] + second_bias;
          if (p.relu) {  // written so that NaN stays NaN
            first = first < 0.f ? 0.f : first;
            second = second < 0.f ? 0.f : second;
          }
          const int row = i * 16 + half * 8 + lane / 4;
          *reinterpret_cast<ElementPair<Element>*>(output + row * Tile::kOutputPitch + column * sizeof(Element)) = {
              from_float<Element>(first), from_float<Element>(second)};
        }
      }
    }
    __syncwarp();
    // Eight lanes read a column of chunks, which the pitch spreads over the banks; a warp writes at least 32 bytes a
    // row.
    constexpr int kRowChunks = Tile::kWarpChannels / Tile::kChunk;
    const int64_t frame = int64_t(at.clip) * p.out_frames + at.frame;
    for (int i = lane; i < Tile::kWarpPixels * kRowChunks; i += 32) {
      const int row = i / (8 * kRowChunks) * 8 + i % 8, column = i / 8 % kRowChunks * Tile::kChunk;
      const int pixel = at.pixel + warp_pixel + row, channel = first_channel + warp_channel + column;
      if (pixel >= p.area) continue;
      const unsigned char* values = output + row * Tile::kOutputPitch + column * sizeof(Element);
      Element* y = static_cast<Element*>(p.y) + (frame * p.area + pixel) * p.y_pitch + channel;
      if (y_in_chunks) {
        if (channel < p.out_channels) *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(values);
      } else {
        for (int i = 0; i < Tile::kChunk; ++i) {
          if (channel + i < p.out_channels) y[i] = reinterpret_cast<const Element*>(values)[i];
        }
      }
    }
    if (p.slow && first_channel == 0) {
      if (slow_in_chunks) {
        copy_slow<uint4, Tile>(p, at);
      } else {
        copy_slow<Element, Tile>(p, at);
      }
    }
  }
}

// Launches if the tile's shared memory fits into shared_limit bytes a block.
template <typename Math, typename Tile>
bool try_launch_lateral_fuse(const LateralParameters& p, int multiprocessors, int shared_limit, cudaStream_t stream) {
  const int64_t bytes = Tile::shared_bytes(p);
  if (bytes > shared_limit) return false;
  const auto kernel = lateral_fuse_kernel<Math, Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  // 1 KiB of each block's shared memory is the system's.
  const int blocks_each = min(Tile::kBlocks, static_cast<int>((shared_limit + 1024) / (bytes + 1024)));
  const int channel_tiles = Tile::channel_tiles(p);
  const int blocks = min(Tile::tiles(p), max(1, multiprocessors * blocks_each / channel_tiles));
  const int element = sizeof(typename Math::Element);
  const bool y_in_chunks = has_chunks(p.y, p.y_pitch, p.out_channels, element);
  const bool slow_in_chunks = has_chunks(p.slow, p.slow_pitch, p.slow_channels, element) &&
                              has_chunks(p.slow_y, p.y_pitch, p.slow_channels, element);
  launch_kernel(kernel, blocks * channel_tiles, Tile::kThreads, bytes, stream, p, y_in_chunks, slow_in_chunks);
  return true;
}

// shared_limit: bytes of dynamic shared memory that a block may ask for; the 99 KiB of compute capability 8.6 suffice.
template <typename Math>
void launch_lateral_fuse(const LateralParameters& p, int multiprocessors, int shared_limit, cudaStream_t stream) {
  const auto launch = [&](auto tile) {
    return try_launch_lateral_fuse<Math, decltype(tile)>(p, multiprocessors, shared_limit, stream);
  };
  const int element = sizeof(typename Math::Element);
  if (!has_chunks(p.fast, p.fast_pitch, p.in_channels, element) || !is_aligned(p.weight, 16)) {
    launch(LateralTile<Math, 64, 4, 2, false, false>());
    return;
  }
  if (p.out_channels <= 16 && launch(LateralTile<Math, 16, 8, 1, true, true>())) return;
  if (p.out_channels > 64 && launch(LateralTile<Math, 128, 4, 2, true, true>())) return;
  if (launch(LateralTile<Math, 64, 4, 2, true, true>())) return;
  launch(LateralTile<Math, 64, 4, 2, false, true>());
}

}  // namespace slowfast_ext
