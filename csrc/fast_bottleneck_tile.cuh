// A bottleneck block of the Fast pathway in one launch, over channels-last tensors of 16-bit elements:
//   a = relu(conv3x1x1(x) + bias_a), b = relu(conv1x3x3(a, stride) + bias_b),
//   y = relu(conv1x1x1(b) + bias_c + shortcut), shortcut = x or conv1x1x1(x, stride) + bias_shortcut.
// Sums are float32; a, b and y are rounded once each; a and b never leave the chip.
//
// A thread block computes one spatial tile of y and walks through time. Frames of x (tile and a halo of one pixel)
// arrive in a ring of three: t - 1 is the shortcut of the frame that is finished, t is multiplied, t + 1 is on its way.
// Frame t enters the sums of a at t - 1, t and t + 1, which rotate through registers, so that it is read from shared
// memory once and not three times. The finished a goes to shared memory, zero outside the image (b is padded with
// zeros, not with relu(bias_a)); b stays in registers, where the sums of two 16 x 8 products are the operand of the
// next one. Per frame two barriers: x has landed, a is complete.
//
// Conflict-free without a swizzle: a pixel takes an odd number of 16-byte chunks, so that the same chunk of 8
// neighbours lies in 8 different bank groups. With stride 2 even columns come first in a row, then odd ones, and
// neighbours of the output are neighbours again. Weights lie in the order in which lanes read them.
//
// Per thread block, by ptxas 13.0 for sm_90 and bfloat16; float16 and sm_80 are alike, none spills. Bytes are those per
// pixel of y, each tensor moved once: fused, and layer by layer (a, b and a projection written and read again). x is
// read `halo` times and a computed as often; neighbours find most of that in L2. A chunk of n frames reads n + 2.
//
//   in  inner stride  tile of y  warps  shared bytes  registers  blocks an SM  bytes fused  layers  halo
//    8     8     1      8 x 16     4        15808        112           4            80       288   1.41
//   32     8     1      8 x 16     4        50112        100           4           128       256   1.41
//   32    16     2      8 x 8      4        97440        193           2           384      1024   1.13
//   64    16     1      8 x 16     4        99584        168           2           256       512   1.41
//   64    32     2      8 x 8      8       204032        226           1           768      2048   1.13
//   64    32     2      4 x 8      4       134400        226           1           768      2048   1.20
//  128    32     1      8 x 16     4       213248        241           1           512      1024   1.41
//  128    32     1      8 x 8      4       141568        194           1           512      1024   1.56
#pragma once

#include "device/ptx.h"

namespace slowfast_ext {

// Sizes, and pitches in elements. x and y are (N, frames, height, width) pixels at one distance.
struct FastBottleneckParameters {
  const void* x;
  const void* weight_a;         // (inner, 3, in), dense
  const void* weight_b;         // (inner, 3, 3, inner), dense
  const void* weight_c;         // (4 * inner, inner), dense
  const void* weight_shortcut;  // (4 * inner, in), dense, or null
  const float *bias_a, *bias_b, *bias_c, *bias_shortcut;
  void* y;
  int64_t x_pitch, y_pitch;
  int batch, frames, in_h, in_w, out_h, out_w;
  int tiles_h, tiles_w, chunks, frames_per_chunk;  // how thread blocks share the output
  bool wide;                                       // y can be accessed in 16 bytes
};

inline bool stores_in_chunks(const FastBottleneckParameters& p) {
  return reinterpret_cast<uintptr_t>(p.y) % 16 == 0 && p.y_pitch % 8 == 0;
}

// A kind of block, and the tile of the output that a thread block computes.
template <int kInChannels_, int kChannels_, int kStride_, int kHeight_, int kWidth_, int kWarps_>
struct FastBottleneckTile {
  static constexpr int kInChannels = kInChannels_, kChannels = kChannels_, kOutChannels = 4 * kChannels_;
  static constexpr int kStride = kStride_, kHeight = kHeight_, kWidth = kWidth_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr bool kProjection = kStride != 1 || kInChannels != kOutChannels;
  // The pixels of x and a under the tile.
  static constexpr int kHaloHeight = kStride * (kHeight - 1) + 3, kHaloWidth = kStride * (kWidth - 1) + 3;
  static constexpr int kHaloPixels = kHaloHeight * kHaloWidth;
  // 16-row operands of a warp, for a and for b and y.
  static constexpr int kHaloOperands = (kHaloPixels + 16 * kWarps - 1) / (16 * kWarps);
  static constexpr int kOperands = kHeight * kWidth / 16, kWarpOperands = (kOperands + kWarps - 1) / kWarps;
  static constexpr int kFrames = 3;
  static constexpr int kXPitch = (kInChannels / 8 | 1) * 16, kAPitch = (kChannels / 8 | 1) * 16;

  static_assert(kChannels % 8 == 0 && kInChannels % 8 == 0 && kWidth % 8 == 0, "fragments are 8 wide");
  static_assert(kOperands % kWarps == 0 || kOperands < kWarps, "every warp has as many operands, or one or none");

  // The image column of a column in shared memory, relative to the halo's first, and where a kernel tap reads.
  static constexpr __host__ __device__ int image_column(int column) {
    if (kStride == 1) return column;
    return column <= kWidth ? 2 * column : 2 * (column - kWidth) - 1;
  }
  static constexpr __host__ __device__ int tap_offset(int h, int w) {
    if (kStride == 1) return h * kHaloWidth + w;
    return h * kHaloWidth + (w == 1 ? kWidth + 1 : w / 2);
  }
  static constexpr __host__ __device__ int first_tap(int h, int w) { return h * kStride * kHaloWidth + w; }
};

}  // namespace slowfast_ext
