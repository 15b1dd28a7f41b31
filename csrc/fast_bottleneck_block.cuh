// How a thread block of fast_bottleneck computes its tile; fast_bottleneck_tile.cuh explains why so.
#pragma once

#include "fast_bottleneck_tile.cuh"

namespace slowfast_ext {

// The right operand of a product over kDepth channels, for 8 * kTiles columns, in shared memory.
template <typename Element, int kTiles, int kDepth>
struct WeightFragments {
  static constexpr int kSteps = (kDepth + 15) / 16, kBytes = kSteps * kTiles * 32 * 8;
  uint32_t* words;  // of (step, tile, lane, half)

  // From rows of kDepth elements: column c of tile i is row(i, c).
  template <typename Row>
  __device__ __forceinline__ void fill(const void* weight, int threads, Row row) const {
    constexpr int kChunks = 2 * kSteps;
#pragma unroll 4
    for (int i = threadIdx.x; i < kTiles * 8 * kChunks; i += threads) {
      const int chunk = i % kChunks, column = i / kChunks % 8, tile = i / kChunks / 8;
      uint4 values = make_uint4(0, 0, 0, 0);
      if (chunk * 8 < kDepth) {
        const Element* source = static_cast<const Element*>(weight) + row(tile, column) * kDepth + chunk * 8;
        values = *reinterpret_cast<const uint4*>(source);
      }
      uint32_t* destination = words + ((chunk / 2 * kTiles + tile) * 32 + column * 4) * 2 + chunk % 2;
      destination[0] = values.x;
      destination[2] = values.y;
      destination[4] = values.z;
      destination[6] = values.w;
    }
  }

  __device__ __forceinline__ void load(uint32_t (&b)[2], int step, int tile) const {
    const uint2 pair = reinterpret_cast<const uint2*>(words)[(step * kTiles + tile) * 32 + threadIdx.x % 32];
    b[0] = pair.x;
    b[1] = pair.y;
  }
};

template <typename Element, typename Tile>
class FastBottleneckBlock {
  static constexpr int kInner = Tile::kChannels / 8, kIn = Tile::kInChannels / 8, kOut = Tile::kOutChannels / 8;
  using WeightsA = WeightFragments<Element, 3 * kInner, Tile::kInChannels>;
  using WeightsB = WeightFragments<Element, kInner, 9 * Tile::kChannels>;
  using WeightsC = WeightFragments<Element, kOut, Tile::kChannels>;
  using WeightsShortcut = WeightFragments<Element, kOut, Tile::kInChannels>;

  static constexpr int kFrameBytes = Tile::kHaloPixels * Tile::kXPitch;
  static constexpr int kAOffset = Tile::kFrames * kFrameBytes;
  static constexpr int kWeightsAOffset = kAOffset + Tile::kHaloPixels * Tile::kAPitch;
  static constexpr int kWeightsBOffset = kWeightsAOffset + WeightsA::kBytes;
  static constexpr int kWeightsCOffset = kWeightsBOffset + WeightsB::kBytes;
  static constexpr int kWeightsShortcutOffset = kWeightsCOffset + WeightsC::kBytes;
  static constexpr int kBiasOffset = kWeightsShortcutOffset + (Tile::kProjection ? WeightsShortcut::kBytes : 0);

 public:
  static constexpr int kSharedBytes = kBiasOffset + 6 * Tile::kChannels * 4;

  __device__ __forceinline__ FastBottleneckBlock(const FastBottleneckParameters& p, unsigned char* shared)
      : p_(p),
        x_ring_(shared),
        a_(shared + kAOffset),
        bias_(reinterpret_cast<float*>(shared + kBiasOffset)),
        weights_a_{reinterpret_cast<uint32_t*>(shared + kWeightsAOffset)},
        weights_b_{reinterpret_cast<uint32_t*>(shared + kWeightsBOffset)},
        weights_c_{reinterpret_cast<uint32_t*>(shared + kWeightsCOffset)},
        weights_shortcut_{reinterpret_cast<uint32_t*>(shared + kWeightsShortcutOffset)},
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {
    int block = blockIdx.x;
    out_w_ = block % p.tiles_w * Tile::kWidth;
    block /= p.tiles_w;
    out_h_ = block % p.tiles_h * Tile::kHeight;
    block /= p.tiles_h;
    begin_ = block % p.chunks * p.frames_per_chunk;
    end_ = min(begin_ + p.frames_per_chunk, p.frames);
    first_frame_ = int64_t(block / p.chunks) * p.frames;
    in_h_ = out_h_ * Tile::kStride - 1;
    in_w_ = out_w_ * Tile::kStride - 1;
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < Tile::kHaloOperands; ++i) {
      const int last = Tile::kHaloPixels - 1, first = halo_operand(i) * 16;
      // Rows beyond the halo read its last pixel, and nobody reads their sums.
      x_offset_[i] = min(first + lane_ % 16, last) * Tile::kXPitch + (kIn > 1 ? lane_ / 16 * 16 : 0);
      for (int half = 0; half < 2; ++half) {
        const int pixel = first + half * 8 + lane_ / 4;
        inside_ |= unsigned(is_inside(pixel)) << (2 * i + half);
      }
    }
  }

  __device__ __forceinline__ void run() {
    load_frame(begin_ - 1, 0);
    fill_weights();
    __syncthreads();
#pragma unroll
    for (int ahead = 0; ahead < 3; ++ahead) reset_sum(ahead);
    for (int step = 0, t = begin_ - 1; t <= end_; ++step, ++t) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // frame t has landed for all, and all are done with a and with the frame replaced next
      if (t < end_) load_frame(t + 1, (step + 1) % Tile::kFrames);
      if (t >= 0 && t < p_.frames) accumulate(frame(step % Tile::kFrames));
      if (t > begin_) {
        store_a();
        __syncthreads();  // a is complete
        finish(frame((step - 1) % Tile::kFrames), t - 1);
      }
      rotate();
    }
  }

 private:
  __device__ __forceinline__ unsigned char* frame(int slot) const { return x_ring_ + slot * kFrameBytes; }
  __device__ __forceinline__ int halo_operand(int i) const { return warp_ * Tile::kHaloOperands + i; }

  __device__ __forceinline__ bool is_inside(int pixel) const {
    const int h = in_h_ + pixel / Tile::kHaloWidth, w = in_w_ + Tile::image_column(pixel % Tile::kHaloWidth);
    return static_cast<unsigned>(h) < static_cast<unsigned>(p_.in_h) &&
           static_cast<unsigned>(w) < static_cast<unsigned>(p_.in_w);
  }

  // Starts the copies of frame t, if there is one, and ends their group.
  __device__ __forceinline__ void load_frame(int t, int slot) const {
    if (t >= 0 && t < p_.frames) {
      const Element* source = static_cast<const Element*>(p_.x) + (first_frame_ + t) * p_.in_h * p_.in_w * p_.x_pitch;
      // The odd pitch spreads 8 lanes over the banks if they fill the same chunk of 8 pixels, or 8 chunks of one; of
      // either a warp reads 64 bytes of a pixel at least.
      constexpr int kPixels = kIn % 8 == 0 ? 1 : 8;
      constexpr int kCopies = (Tile::kHaloPixels + kPixels - 1) / kPixels * kPixels * kIn;
      for (int i = threadIdx.x; i < kCopies; i += Tile::kThreads) {
        const int pixel = i / (kPixels * kIn) * kPixels + i % kPixels, chunk = i / kPixels % kIn;
        if (pixel >= Tile::kHaloPixels) continue;
        const int h = in_h_ + pixel / Tile::kHaloWidth, w = in_w_ + Tile::image_column(pixel % Tile::kHaloWidth);
        ptx::cp_async_16(frame(slot) + pixel * Tile::kXPitch + chunk * 16,
                         source + (h * p_.in_w + w) * p_.x_pitch + chunk * 8, is_inside(pixel));
      }
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void fill_weights() const {
    // The sums that rotate: tile / kInner is how far the frame that x enters lies ahead of the finished one.
    weights_a_.fill(p_.weight_a, Tile::kThreads,
                    [](int tile, int column) { return (tile % kInner * 8 + column) * 3 + 2 - tile / kInner; });
    weights_b_.fill(p_.weight_b, Tile::kThreads, [](int tile, int column) { return tile * 8 + column; });
    // A lane's columns 2 t and 2 t + 1 of four tiles are to be 8 neighbouring channels: 16 bytes of y.
    const auto neighbours = [](int tile, int column) {
      return tile / 4 * 32 + column / 2 * 8 + tile % 4 * 2 + column % 2;
    };
    weights_c_.fill(p_.weight_c, Tile::kThreads, neighbours);
    if constexpr (Tile::kProjection) weights_shortcut_.fill(p_.weight_shortcut, Tile::kThreads, neighbours);
    for (int i = threadIdx.x; i < 6 * Tile::kChannels; i += Tile::kThreads) {
      const int c = i - 2 * Tile::kChannels;
      if (i < Tile::kChannels) {
        bias_[i] = p_.bias_a[i];
      } else if (c < 0) {
        bias_[i] = p_.bias_b[i - Tile::kChannels];
      } else {
        bias_[i] = Tile::kProjection ? p_.bias_c[c] + p_.bias_shortcut[c] : p_.bias_c[c];
      }
    }
  }

  // Sixteen channels of sixteen rows; the second eight are zero if there are only kChunks of eight.
  template <int kChunks>
  static __device__ __forceinline__ void load_operand(uint32_t (&a)[4], const unsigned char* address, int step) {
    ptx::ldmatrix_x4(a, address);
    if (2 * step + 1 >= kChunks) a[2] = a[3] = 0;
  }

  static __device__ __forceinline__ float relu(float value) { return value < 0.f ? 0.f : value; }  // NaN stays NaN

  __device__ __forceinline__ void reset_sum(int ahead) {
#pragma unroll
    for (int n = 0; n < kInner; ++n) {
      const float2 bias = *reinterpret_cast<const float2*>(bias_ + n * 8 + lane_ % 4 * 2);
#pragma unroll
      for (int i = 0; i < Tile::kHaloOperands; ++i) {
        sum_a_[ahead][n][i][0] = sum_a_[ahead][n][i][2] = bias.x;
        sum_a_[ahead][n][i][1] = sum_a_[ahead][n][i][3] = bias.y;
      }
    }
  }

  __device__ __forceinline__ void rotate() {
#pragma unroll
    for (int n = 0; n < kInner; ++n) {
#pragma unroll
      for (int i = 0; i < Tile::kHaloOperands; ++i) {
#pragma unroll
        for (int element = 0; element < 4; ++element) {
          sum_a_[0][n][i][element] = sum_a_[1][n][i][element];
          sum_a_[1][n][i][element] = sum_a_[2][n][i][element];
        }
      }
    }
    reset_sum(2);
  }

  // A frame of x enters three frames of a.
  __device__ __forceinline__ void accumulate(const unsigned char* x) {
#pragma unroll
    for (int step = 0; step < WeightsA::kSteps; ++step) {
      uint32_t a[Tile::kHaloOperands][4];
#pragma unroll
      for (int i = 0; i < Tile::kHaloOperands; ++i) load_operand<kIn>(a[i], x + x_offset_[i] + step * 32, step);
#pragma unroll
      for (int tile = 0; tile < 3 * kInner; ++tile) {
        uint32_t b[2];
        weights_a_.load(b, step, tile);
#pragma unroll
        for (int i = 0; i < Tile::kHaloOperands; ++i) {
          ptx::mma_m16n8k16(sum_a_[tile / kInner][tile % kInner][i], a[i], b, Element{});
        }
      }
    }
  }

  __device__ __forceinline__ void store_a() const {
#pragma unroll
    for (int i = 0; i < Tile::kHaloOperands; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = halo_operand(i) * 16 + half * 8 + lane_ / 4;
        if (pixel >= Tile::kHaloPixels) continue;
        const bool inside = inside_ >> (2 * i + half) & 1;
#pragma unroll
        for (int n = 0; n < kInner; ++n) {
          const float* sum = &sum_a_[0][n][i][half * 2];
          *reinterpret_cast<uint32_t*>(a_ + pixel * Tile::kAPitch + n * 16 + lane_ % 4 * 4) =
              inside ? ptx::pack(relu(sum[0]), relu(sum[1]), Element{}) : 0u;
        }
      }
    }
  }

  // Row r of 8 is pixel r / 2 + r % 2 * 4: rows 2 i and 2 i + 1, whose lanes read 64 bytes each of the shortcut at the
  // same time, are 4 pixels apart, an odd multiple of 64 bytes.
  static __device__ __forceinline__ int pixel_of_row(int row) { return row / 2 + row % 2 * 4; }

  // The output's row and column in the tile, for a row of an operand.
  static __device__ __forceinline__ void locate(int operand, int row, int& h, int& w) {
    constexpr int kEights = Tile::kWidth / 8;
    const int eight = operand * 2 + row / 8;
    h = eight / kEights;
    w = eight % kEights * 8 + pixel_of_row(row % 8);
  }

  // b and y of frame t, from a and the same frame of x.
  __device__ __forceinline__ void finish(const unsigned char* x, int t) const {
    if (Tile::kOperands < Tile::kWarps && warp_ >= Tile::kOperands) return;
    uint32_t b[Tile::kWarpOperands][WeightsC::kSteps][4];
    int first_tap[Tile::kWarpOperands];
#pragma unroll
    for (int i = 0; i < Tile::kWarpOperands; ++i) {
      int h, w;
      locate(warp_ + i * Tile::kWarps, lane_ % 16, h, w);
      first_tap[i] = Tile::first_tap(h, w);
    }
    convolve_space(b, first_tap);

    constexpr int kCenter = Tile::tap_offset(1, 1);
    uint32_t shortcut[Tile::kWarpOperands][WeightsShortcut::kSteps][4];
    if constexpr (Tile::kProjection) {
#pragma unroll
      for (int i = 0; i < Tile::kWarpOperands; ++i) {
        const unsigned char* pixel = x + (first_tap[i] + kCenter) * Tile::kXPitch + (kIn > 1 ? lane_ / 16 * 16 : 0);
#pragma unroll
        for (int step = 0; step < WeightsShortcut::kSteps; ++step) {
          load_operand<kIn>(shortcut[i][step], pixel + step * 32, step);
        }
      }
    }

    for (int group = 0; group < kOut / 4; ++group) {  // of 32 channels
      const int channel = group * 32 + lane_ % 4 * 8;
      float sum[Tile::kWarpOperands][4][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 bias = *reinterpret_cast<const float2*>(bias_ + 2 * Tile::kChannels + channel + n * 2);
#pragma unroll
        for (int i = 0; i < Tile::kWarpOperands; ++i) {
          sum[i][n][0] = sum[i][n][2] = bias.x;
          sum[i][n][1] = sum[i][n][3] = bias.y;
        }
      }
      multiply(sum, b, weights_c_, group);
      if constexpr (Tile::kProjection) multiply(sum, shortcut, weights_shortcut_, group);
#pragma unroll
      for (int i = 0; i < Tile::kWarpOperands; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int h, w;
          locate(warp_ + i * Tile::kWarps, half * 8 + lane_ / 4, h, w);
          const unsigned char* residual = x + (Tile::first_tap(h, w) + kCenter) * Tile::kXPitch + channel * 2;
          store(sum[i], half, residual, t, out_h_ + h, out_w_ + w, channel);
        }
      }
    }
  }

  // b, as the left operand of the next product.
  __device__ __forceinline__ void convolve_space(uint32_t (&b)[Tile::kWarpOperands][WeightsC::kSteps][4],
                                                 const int (&first_tap)[Tile::kWarpOperands]) const {
    float sum[kInner][Tile::kWarpOperands][4];
#pragma unroll
    for (int n = 0; n < kInner; ++n) {
      const float2 bias = *reinterpret_cast<const float2*>(bias_ + Tile::kChannels + n * 8 + lane_ % 4 * 2);
#pragma unroll
      for (int i = 0; i < Tile::kWarpOperands; ++i) {
        sum[n][i][0] = sum[n][i][2] = bias.x;
        sum[n][i][1] = sum[n][i][3] = bias.y;
      }
    }
#pragma unroll
    for (int step = 0; step < WeightsB::kSteps; ++step) {
      // Chunks of 8 channels, tap after tap; lanes from 16 on read the second one.
      constexpr int kChunks = 9 * kInner;
      const auto offset = [](int chunk) {
        const int tap = chunk / kInner;
        return Tile::tap_offset(tap / 3, tap % 3) * Tile::kAPitch + chunk % kInner * 16;
      };
      const int first = offset(2 * step), second = offset(min(2 * step + 1, kChunks - 1));
      uint32_t a[Tile::kWarpOperands][4];
#pragma unroll
      for (int i = 0; i < Tile::kWarpOperands; ++i) {
        const unsigned char* pixel = a_ + first_tap[i] * Tile::kAPitch;
        load_operand<kChunks>(a[i], pixel + first + lane_ / 16 * (second - first), step);
      }
#pragma unroll
      for (int n = 0; n < kInner; ++n) {
        uint32_t weights[2];
        weights_b_.load(weights, step, n);
#pragma unroll
        for (int i = 0; i < Tile::kWarpOperands; ++i) ptx::mma_m16n8k16(sum[n][i], a[i], weights, Element{});
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kWarpOperands; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < 2 * WeightsC::kSteps; ++chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& packed = b[i][chunk / 2][chunk % 2 * 2 + half];
          if (chunk < kInner) {
            const float* pair = &sum[chunk][i][half * 2];
            packed = ptx::pack(relu(pair[0]), relu(pair[1]), Element{});
          } else {
            packed = 0;
          }
        }
      }
    }
  }

  // Four tiles of columns: one group of 32 channels.
  template <typename Weights>
  __device__ __forceinline__ void multiply(float (&sum)[Tile::kWarpOperands][4][4],
                                           const uint32_t (&a)[Tile::kWarpOperands][Weights::kSteps][4],
                                           const Weights& weights, int group) const {
#pragma unroll
    for (int step = 0; step < Weights::kSteps; ++step) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[2];
        weights.load(b, step, group * 4 + n);
#pragma unroll
        for (int i = 0; i < Tile::kWarpOperands; ++i) ptx::mma_m16n8k16(sum[i][n], a[i][step], b, Element{});
      }
    }
  }

  // Eight channels of one pixel.
  __device__ __forceinline__ void store(const float (&sum)[4][4], int half, const unsigned char* residual, int t, int h,
                                        int w, int channel) const {
    if (h >= p_.out_h || w >= p_.out_w) return;
    uint4 added = make_uint4(0, 0, 0, 0);
    if constexpr (!Tile::kProjection) added = *reinterpret_cast<const uint4*>(residual);
    const auto finished = [&](int n, uint32_t pair) {
      const float2 value = ptx::unpack(pair, Element{});
      return ptx::pack(relu(sum[n][half * 2] + value.x), relu(sum[n][half * 2 + 1] + value.y), Element{});
    };
    const uint4 result =
        make_uint4(finished(0, added.x), finished(1, added.y), finished(2, added.z), finished(3, added.w));
    Element* y =
        static_cast<Element*>(p_.y) + (((first_frame_ + t) * p_.out_h + h) * p_.out_w + w) * p_.y_pitch + channel;
    if (p_.wide) {
      *reinterpret_cast<uint4*>(y) = result;
    } else {
      const uint32_t words[4] = {result.x, result.y, result.z, result.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
        reinterpret_cast<uint16_t*>(y)[i] = bits;
      }
    }
  }

  const FastBottleneckParameters& p_;
  unsigned char *const x_ring_, *const a_;
  float* const bias_;
  const WeightsA weights_a_;
  const WeightsB weights_b_;
  const WeightsC weights_c_;
  const WeightsShortcut weights_shortcut_;
  const int lane_, warp_;
  int out_h_, out_w_, in_h_, in_w_;  // where the tile and its halo begin
  int begin_, end_;                  // the frames of y
  int64_t first_frame_;              // of this clip, counted over the batch
  int x_offset_[Tile::kHaloOperands];
  uint32_t inside_;                                 // whether the lane's rows of a lie in the image
  float sum_a_[3][kInner][Tile::kHaloOperands][4];  // of frames t - 1, t, t + 1
};

template <typename Element, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) fast_bottleneck_kernel(const FastBottleneckParameters p) {
  SHARED_MEMORY(shared);
  FastBottleneckBlock<Element, Tile>(p, shared).run();
}

}  // namespace slowfast_ext
