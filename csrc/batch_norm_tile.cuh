// What the passes of batch norm share: which thread has which channels and pixels, and how these are read and written.
//
// A thread has one chunk of channels, 16 bytes or a single element, of every n-th pixel of its block; up to 8 chunks
// lie side by side, 128 bytes, and pixels of fewer chunks lie side by side themselves. What concerns a channel stays in
// registers.
#pragma once

#include <cstring>
#include <type_traits>

#include "batch_norm_merge.cuh"
#include "device/ptx.h"

namespace slowfast_ext {

// (N, C, T, H, W) in the layout N, T, H, W, C: pixels are `pitch` elements apart.
struct PixelMap {
  void* data;  // null if there is none
  int64_t pitch;
};

// Row r of a group is a pixel: those of clip `group`, then those of clip `group + groups`, and so on.
struct BatchNormParameters {
  PixelMap x, residual, y;  // y is written forwards, read backwards for its sign: null to compute that again from x
  PixelMap grad, grad_x, grad_residual;
  const float *mean, *inverse_std;              // (groups, channels)
  const float *weight, *bias;                   // (channels); null for 1 and 0
  const float *sum_grad, *sum_grad_normalized;  // (groups, channels); null if statistics are constants
  float inverse_count;                          // of the elements that are in these sums
  float2* partials;                             // (groups, blocks, channels)
  int channels, groups;
  int rows, clip_pixels;  // of a group, of a clip
  bool relu;
  // From plan_batch_norm().
  bool vector;  // chunks are 16 bytes, not single elements
  int columns, rows_per_block, blocks;
};

constexpr int kBatchNormThreads = 256;

template <typename Element_, bool kVector>
struct BatchNormTile {
  using Element = Element_;
  using Chunk = std::conditional_t<kVector, uint4, Element>;
  static constexpr int kChunk = sizeof(Chunk) / sizeof(Element);
  static constexpr int kColumns = kVector ? 8 : 32;  // chunks of a pixel in a block, at most
  static constexpr int kWarps = kBatchNormThreads / 32;
  // Between the sums of neighbouring elements of a chunk: those of neighbouring channels lie in different banks.
  static constexpr int kPitch = kColumns + 32 / kChunk % kColumns;
  static constexpr int kPlane = kChunk * kPitch;
  static constexpr int kSharedBytes = kWarps * (2 * kPlane + 1) * sizeof(float);
};

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Sets the last members of `p` from the others. The same on every GPU, so that sums are.
inline void plan_batch_norm(BatchNormParameters& p, int element_size) {
  // Blocks for some rounds on the largest GPUs, of work for a thread that is worth starting it.
  constexpr int64_t kBlocks = 2048, kLeastPasses = 4;
  const int chunk = 16 / element_size;
  p.vector = p.channels % chunk == 0;
  for (const PixelMap& map : {p.x, p.residual, p.y, p.grad, p.grad_x, p.grad_residual}) {
    p.vector &= reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.pitch % chunk == 0;
  }
  for (const float* vector : {p.mean, p.inverse_std, p.weight, p.bias, p.sum_grad, p.sum_grad_normalized}) {
    p.vector &= reinterpret_cast<uintptr_t>(vector) % 16 == 0;
  }
  const int chunks = p.vector ? p.channels / chunk : p.channels;
  for (p.columns = 1; p.columns < chunks && p.columns < (p.vector ? 8 : 32);) p.columns *= 2;
  const int64_t rows = kBatchNormThreads / p.columns;  // of a pass of the block
  const int64_t passes = int64_t(p.groups) * ceil_div(chunks, p.columns) * ceil_div(p.rows, rows);
  p.rows_per_block = static_cast<int>(rows * max(kLeastPasses, int64_t(ceil_div(passes, kBlocks))));
  p.blocks = ceil_div(p.rows, p.rows_per_block);
}

// Of the partials that a reduction wrote.
inline BatchNormMergeParameters merge_parameters(const BatchNormParameters& p) {
  return {p.partials, p.groups, p.blocks, p.channels, p.rows, p.rows_per_block};
}

using BatchNormKernel = void (*)(BatchNormParameters);

// Of the kernels for 16 bytes and for single elements the one that the plan asks for.
template <typename Element>
void launch_batch_norm(const BatchNormParameters& p, BatchNormKernel vector, BatchNormKernel single, bool reduces,
                       cudaStream_t stream) {
  const int chunk = p.vector ? 16 / sizeof(Element) : 1;
  const unsigned blocks = unsigned(p.groups) * p.blocks * ceil_div(p.channels, p.columns * chunk);
  if (blocks == 0) return;
  const size_t shared_bytes =
      p.vector ? BatchNormTile<Element, true>::kSharedBytes : BatchNormTile<Element, false>::kSharedBytes;
  launch_kernel(p.vector ? vector : single, blocks, kBatchNormThreads, reduces ? shared_bytes : 0, stream, p);
}

// What a thread works on. Reductions go backwards through the memory that was just written forwards, and what follows
// them goes forwards again: each begins with what is still in L2.
template <typename Tile>
struct BatchNormPlace {
  int group, block, first_channel, column, channel;
  int row, step, end;  // the thread's rows

  __device__ __forceinline__ BatchNormPlace(const BatchNormParameters& p, bool backwards) {
    const int slice_channels = p.columns * Tile::kChunk;
    const int slices = (p.channels + slice_channels - 1) / slice_channels;
    const int index = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    group = index / slices / p.blocks;
    block = index / slices % p.blocks;
    first_channel = index % slices * slice_channels;
    column = threadIdx.x % p.columns;
    channel = first_channel + column * Tile::kChunk;
    step = kBatchNormThreads / p.columns;
    const int first_row = block * p.rows_per_block;
    row = first_row + threadIdx.x / p.columns;
    end = channel < p.channels ? first_row + min(p.rows_per_block, p.rows - first_row) : 0;
  }
};

// For each row of the thread use(load(pixel), pixel); kUnroll rows are loaded before the first of them is used.
template <int kUnroll, typename Tile, typename Load, typename Use>
__device__ __forceinline__ void for_each_row(const BatchNormParameters& p, const BatchNormPlace<Tile>& at, Load load,
                                             Use use) {
  const auto pixel_of = [&](int row) {
    return p.groups == 1 ? row : row + (row / p.clip_pixels * (p.groups - 1) + at.group) * p.clip_pixels;
  };
  int row = at.row;
  for (; row + (kUnroll - 1) * at.step < at.end; row += kUnroll * at.step) {
    int pixels[kUnroll];
    decltype(load(0)) loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      pixels[i] = pixel_of(row + i * at.step);
      loaded[i] = load(pixels[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) use(loaded[i], pixels[i]);
  }
  for (; row < at.end; row += at.step) {
    const int pixel = pixel_of(row);
    use(load(pixel), pixel);
  }
}

// Not through __ldg: y may be x.
template <typename Tile>
__device__ __forceinline__ typename Tile::Chunk load_pixel(const PixelMap& map, int pixel, int channel) {
  const auto* source = static_cast<const typename Tile::Element*>(map.data) + pixel * map.pitch + channel;
  return *reinterpret_cast<const typename Tile::Chunk*>(source);
}

template <typename Tile>
__device__ __forceinline__ void store_pixel(const PixelMap& map, int pixel, int channel,
                                            const float (&values)[Tile::kChunk]) {
  using Element = typename Tile::Element;
  Element elements[Tile::kChunk];
#pragma unroll
  for (int i = 0; i < Tile::kChunk; ++i) elements[i] = from_float<Element>(values[i]);
  typename Tile::Chunk chunk;
  memcpy(&chunk, elements, sizeof(chunk));
  auto* target = static_cast<Element*>(map.data) + pixel * map.pitch + channel;
  *reinterpret_cast<typename Tile::Chunk*>(target) = chunk;
}

template <typename Tile>
__device__ __forceinline__ void to_floats(float (&values)[Tile::kChunk], const typename Tile::Chunk& chunk) {
  typename Tile::Element elements[Tile::kChunk];
  memcpy(elements, &chunk, sizeof(chunk));
#pragma unroll
  for (int i = 0; i < Tile::kChunk; ++i) values[i] = to_float(elements[i]);
}

// kChunk channels of a vector, in 16 bytes each four; `otherwise` if there is none.
template <int kChunk>
__device__ __forceinline__ void load_vector(float (&values)[kChunk], const float* vector, int64_t at, float otherwise) {
  if constexpr (kChunk == 1) {
    values[0] = vector ? vector[at] : otherwise;
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      float4 four = make_float4(otherwise, otherwise, otherwise, otherwise);
      if (vector) four = *reinterpret_cast<const float4*>(vector + at + i);
      values[i] = four.x;
      values[i + 1] = four.y;
      values[i + 2] = four.z;
      values[i + 3] = four.w;
    }
  }
}

// (x - mean) * inverse_std * weight + bias. One expression for all passes, so that they agree on its sign.
template <int kChunk>
struct BatchNormAffine {
  float mean[kChunk], scale[kChunk], bias[kChunk];

  __device__ __forceinline__ BatchNormAffine(const BatchNormParameters& p, int group, int channel) {
    float weight[kChunk];
    load_vector(mean, p.mean, int64_t(group) * p.channels + channel, 0.f);
    load_vector(scale, p.inverse_std, int64_t(group) * p.channels + channel, 1.f);
    load_vector(weight, p.weight, channel, 1.f);
    load_vector(bias, p.bias, channel, 0.f);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) scale[i] *= weight[i];
  }
  __device__ __forceinline__ float operator()(float x, int i) const { return fmaf(x - mean[i], scale[i], bias[i]); }
};

// Merges what the threads of a block have of each channel, of `count` rows each, and writes it to the partials.
template <typename Merge, typename Tile>
__device__ __forceinline__ void merge_block(const BatchNormParameters& p, const BatchNormPlace<Tile>& at,
                                            float2 (&merged)[Tile::kChunk], float count, unsigned char* shared) {
  constexpr int kChunk = Tile::kChunk, kPitch = Tile::kPitch, kPlane = Tile::kPlane;
  float* const first = reinterpret_cast<float*>(shared);  // (warp, element of a chunk, column)
  float* const second = first + Tile::kWarps * kPlane;
  float* const counts = second + Tile::kWarps * kPlane;  // (warp)

  for (int distance = p.columns; distance < 32; distance *= 2) {
    const float other_count = __shfl_xor_sync(~0u, count, distance);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) Merge::merge(merged[i], shuffle_xor(merged[i], distance), count, other_count);
    count += other_count;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < p.columns) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      first[warp * kPlane + i * kPitch + lane] = merged[i].x;
      second[warp * kPlane + i * kPitch + lane] = merged[i].y;
    }
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  const int thread = threadIdx.x, channel = at.first_channel + thread;
  if (thread >= p.columns * kChunk || channel >= p.channels) return;
  const int source = thread % kChunk * kPitch + thread / kChunk;
  float2 total = make_float2(0.f, 0.f);
  count = 0.f;
#pragma unroll
  for (int i = 0; i < Tile::kWarps; ++i) {
    Merge::merge(total, make_float2(first[i * kPlane + source], second[i * kPlane + source]), count, counts[i]);
    count += counts[i];
  }
  p.partials[(int64_t(at.group) * p.blocks + at.block) * p.channels + channel] = total;
}

}  // namespace slowfast_ext
