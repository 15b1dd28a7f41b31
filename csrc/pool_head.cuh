// The head of the network in float32: average [fast, slow] over frames and positions, apply the linear layer, and, if
// asked, take the softmax and average it over positions and views.
//
// Launches: averages, linear layer and, where there is a softmax, one more. The averages are one pass over the features
// in 16-byte loads, 64 neighbouring bytes of a pixel each; up to 4 windows are summed at once, so that every element is
// read once for maps up to one larger than the window (crops of 256 pixels), and from L2 again for each 4 further ones.
// The order of all sums is fixed by the shapes: no atomics, the same bits every time.
//
// Memory traffic, 30 views of R50 8x8 at 256 x 256 in 16 bits: features 94.4 MB, averages 0.6 MB (written and read),
// weight 1.8 MB, logits 0.1 MB: the floor of 94.4 + 1.8 MB is missed by 0.7 %.
#pragma once

#include <cmath>
#include <cstring>

#include "device/ptx.h"

namespace slowfast_ext {

// Features (N, channels, frames, height, width) of a pathway: channels side by side, pixels pixel_pitch elements apart.
struct PathwayMap {
  const void* x;
  int64_t pixel_pitch;
  int channels, frames, height, width;
  int window_h, window_w;  // what is averaged: height and width for a global average
};

struct PoolHeadParameters {
  PathwayMap fast, slow;
  const void* weight;  // (classes, features), dense
  const float* bias;   // (classes) or null
  float* averages;     // workspace (batch * positions, features)
  float* logits;       // (batch * positions, classes): the result if group is 0, else workspace
  float* y;            // (batch * positions / group, classes)
  int batch, classes;
  int features;    // fast.channels + slow.channels
  int positions;   // 1: one average over all windows; else one for each window
  int group;       // how many rows of logits a row of y summarises; 0 for no softmax
  bool logarithm;  // y is the logarithm of the mean probability, not the mean itself
};

// kChunk elements as float32: 16 aligned bytes, or a single element.
template <int kChunk, typename Element>
__device__ __forceinline__ void load_chunk(float (&values)[kChunk], const Element* source) {
  if constexpr (kChunk == 1) {
    values[0] = to_float(*source);
  } else {
    static_assert(kChunk * sizeof(Element) == 16, "one load");
    const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(source));
    Element elements[kChunk];
    memcpy(elements, &bytes, 16);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = to_float(elements[i]);
  }
}

// Row and column of a pixel that advances by `step` pixels at a time, through frame after frame, without a division.
class PlaneCursor {
 public:
  __device__ __forceinline__ PlaneCursor(const PathwayMap& map, int pixel, int step)
      : height_(map.height),
        width_(map.width),
        step_h_(step / map.width % map.height),
        step_w_(step % map.width),
        h_(pixel / map.width % map.height),
        w_(pixel % map.width) {}

  __device__ __forceinline__ void advance() {
    h_ += step_h_;
    w_ += step_w_;
    if (w_ >= width_) {
      w_ -= width_;
      ++h_;
    }
    if (h_ >= height_) h_ -= height_;
  }
  __device__ __forceinline__ int h() const { return h_; }
  __device__ __forceinline__ int w() const { return w_; }

 private:
  int height_, width_, step_h_, step_w_, h_, w_;
};

// How many of the windows that slide over [0, size) with stride 1 contain `at`.
__device__ __forceinline__ int windows_around(int at, int size, int window) {
  return min(min(at + 1, size - at), min(window, size - window + 1));
}

constexpr int kAverageThreads = 512;

// What a block of the averages covers: some channels of one clip of one pathway, all pixels, kPositions windows.
template <typename Element, bool kVector, int kPositions>
struct AverageTile {
  static constexpr int kChunk = kVector ? 16 / sizeof(Element) : 1;
  static constexpr int kColumns = kVector ? 4 : 32;  // chunks
  static constexpr int kChannels = kColumns * kChunk;
  static constexpr int kPixels = kAverageThreads / kColumns;  // read side by side
  static constexpr int kSums = kPositions * kChannels;
  static constexpr int kSharedBytes = kAverageThreads / 32 * kSums * sizeof(float);
  static_assert(kSums <= kAverageThreads, "a thread finishes at most one sum");

  static __host__ __device__ int slices(const PathwayMap& map) { return (map.channels + kChannels - 1) / kChannels; }
  static __host__ __device__ int passes(const PoolHeadParameters& p) {
    return (p.positions + kPositions - 1) / kPositions;
  }
};

template <typename Element, bool kVector, int kPositions>
__global__ void __launch_bounds__(kAverageThreads) pool_head_average_kernel(const PoolHeadParameters p) {
  using Tile = AverageTile<Element, kVector, kPositions>;
  constexpr int kChunk = Tile::kChunk, kUnroll = 4;
  SHARED_MEMORY(shared);

  // The blocks of Fast come first: it has the most frames, and what is started last should be short.
  const int pass = blockIdx.x % Tile::passes(p);
  int block = blockIdx.x / Tile::passes(p);
  const bool is_fast = block < p.batch * Tile::slices(p.fast);
  if (!is_fast) block -= p.batch * Tile::slices(p.fast);
  const PathwayMap map = is_fast ? p.fast : p.slow;
  const int clip = block / Tile::slices(map), first_channel = block % Tile::slices(map) * Tile::kChannels;

  const int column = threadIdx.x % Tile::kColumns, channel = first_channel + column * kChunk;
  const int windows_w = map.width - map.window_w + 1;
  int top[kPositions], left[kPositions];  // of the windows
#pragma unroll
  for (int position = 0; position < kPositions; ++position) {
    top[position] = (pass * kPositions + position) / windows_w;
    left[position] = (pass * kPositions + position) % windows_w;
  }
  float sum[kPositions][kChunk] = {};
  if (channel < map.channels) {
    const int pixels = map.frames * map.height * map.width;
    int pixel = threadIdx.x / Tile::kColumns;
    PlaneCursor at(map, pixel, Tile::kPixels);
    const Element* source =
        static_cast<const Element*>(map.x) + (int64_t(clip) * pixels + pixel) * map.pixel_pitch + channel;
    const int64_t step = Tile::kPixels * map.pixel_pitch;

    const auto add = [&](const float (&values)[kChunk]) {
      if constexpr (kPositions == 1) {
        const float weight = static_cast<float>(windows_around(at.h(), map.height, map.window_h) *
                                                windows_around(at.w(), map.width, map.window_w));
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum[0][i] += weight * values[i];
      } else {
#pragma unroll
        for (int position = 0; position < kPositions; ++position) {
          // Not a factor of 0 or 1: what is infinite outside a window is none of its business.
          if (static_cast<unsigned>(at.h() - top[position]) < static_cast<unsigned>(map.window_h) &&
              static_cast<unsigned>(at.w() - left[position]) < static_cast<unsigned>(map.window_w)) {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) sum[position][i] += values[i];
          }
        }
      }
      at.advance();
    };

    for (; pixel + (kUnroll - 1) * Tile::kPixels < pixels; pixel += kUnroll * Tile::kPixels) {
      float values[kUnroll][kChunk];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) load_chunk(values[i], source + i * step);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) add(values[i]);
      source += kUnroll * step;
    }
    for (; pixel < pixels; pixel += Tile::kPixels) {
      float values[kChunk];
      load_chunk(values, source);
      add(values);
      source += step;
    }
  }

  // Over the lanes of a warp that have the same channels, then over the warps.
  float* partial = reinterpret_cast<float*>(shared);  // (warp, position, channel)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int position = 0; position < kPositions; ++position) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      float value = sum[position][i];
#pragma unroll
      for (int distance = Tile::kColumns; distance < 32; distance *= 2) value += __shfl_xor_sync(~0u, value, distance);
      if (lane < Tile::kColumns) partial[warp * Tile::kSums + position * Tile::kChannels + column * kChunk + i] = value;
    }
  }
  __syncthreads();
  if (threadIdx.x >= Tile::kSums) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kAverageThreads / 32; ++i) total += partial[i * Tile::kSums + threadIdx.x];
  const int position = pass * kPositions + threadIdx.x / Tile::kChannels;
  const int out_channel = first_channel + threadIdx.x % Tile::kChannels;
  if (position >= p.positions || out_channel >= map.channels) return;
  float count = float(map.frames) * map.window_h * map.window_w;
  if constexpr (kPositions == 1) count *= float(map.height - map.window_h + 1) * windows_w;
  const int64_t row = int64_t(clip) * p.positions + position;
  p.averages[row * p.features + (is_fast ? 0 : p.fast.channels) + out_channel] = total / count;
}

// A warp computes kRows x kClasses logits, its lanes share the features.
struct LinearTile {
  static constexpr int kWarps = 4, kRows = 8, kWarpClasses = 2, kClasses = kWarps * kWarpClasses;
};

template <typename Weight, bool kVector>
__global__ void __launch_bounds__(32 * LinearTile::kWarps) pool_head_linear_kernel(const PoolHeadParameters p) {
  constexpr int kChunk = kVector ? 16 / sizeof(Weight) : 1;
  constexpr int kRows = LinearTile::kRows, kClasses = LinearTile::kWarpClasses;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int class_tiles = (p.classes + LinearTile::kClasses - 1) / LinearTile::kClasses;
  const int first_class = blockIdx.x % class_tiles * LinearTile::kClasses + warp * kClasses;
  const int64_t first_row = blockIdx.x / class_tiles * kRows;
  const int rows = static_cast<int>(min(int64_t(kRows), int64_t(p.batch) * p.positions - first_row));

  float sum[kRows][kClasses] = {};
  for (int feature = lane * kChunk; feature < p.features; feature += 32 * kChunk) {
    float weights[kClasses][kChunk] = {};
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      const Weight* source = static_cast<const Weight*>(p.weight) + int64_t(first_class + j) * p.features + feature;
      if (first_class + j < p.classes) load_chunk(weights[j], source);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      const float* averages = p.averages + (first_row + i) * p.features + feature;
      constexpr int kPart = kChunk == 1 ? 1 : 4;
#pragma unroll
      for (int part = 0; part < kChunk; part += kPart) {
        float values[kPart];
        load_chunk(values, averages + part);
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
#pragma unroll
          for (int j = 0; j < kClasses; ++j) sum[i][j] += weights[j][part + k] * values[k];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      float total = sum[i][j];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
      const int label = first_class + j;
      if (lane != i * kClasses + j || i >= rows || label >= p.classes) continue;
      p.logits[(first_row + i) * p.classes + label] = p.bias ? total + p.bias[label] : total;
    }
  }
}

constexpr int kSoftmaxThreads = 1024;

// A block summarises one group of rows; the logits become log-probabilities on the way.
static __global__ void __launch_bounds__(kSoftmaxThreads) pool_head_softmax_kernel(const PoolHeadParameters p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* rows = p.logits + int64_t(blockIdx.x) * p.group * p.classes;
  for (int row = warp; row < p.group; row += kSoftmaxThreads / 32) {
    float* logits = rows + int64_t(row) * p.classes;
    float largest = -INFINITY, sum = 0.f;
    for (int i = lane; i < p.classes; i += 32) largest = fmaxf(largest, logits[i]);
    for (int distance = 16; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    for (int i = lane; i < p.classes; i += 32) sum += expf(logits[i] - largest);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const float scale = logf(sum);
    for (int i = lane; i < p.classes; i += 32) logits[i] = logits[i] - largest - scale;
  }
  __syncthreads();
  for (int label = threadIdx.x; label < p.classes; label += kSoftmaxThreads) {
    // Under the logarithm relative to the largest, because all of them may be too small for float32.
    float largest = p.logarithm ? -INFINITY : 0.f, sum = 0.f;
    if (p.logarithm) {
      for (int row = 0; row < p.group; ++row) largest = fmaxf(largest, rows[int64_t(row) * p.classes + label]);
      if (largest == -INFINITY) largest = 0.f;
    }
    for (int row = 0; row < p.group; ++row) sum += expf(rows[int64_t(row) * p.classes + label] - largest);
    const float mean = sum / p.group;
    p.y[int64_t(blockIdx.x) * p.classes + label] = p.logarithm ? largest + logf(mean) : mean;
  }
}

template <typename Element, bool kVector, int kPositions>
void launch_pool_head_average_tile(const PoolHeadParameters& p, cudaStream_t stream) {
  using Tile = AverageTile<Element, kVector, kPositions>;
  const unsigned blocks = unsigned(p.batch) * (Tile::slices(p.fast) + Tile::slices(p.slow)) * Tile::passes(p);
  launch_kernel(pool_head_average_kernel<Element, kVector, kPositions>, blocks, kAverageThreads, Tile::kSharedBytes,
                stream, p);
}

// From the features, elements of type Element, to the averages.
template <typename Element>
void launch_pool_head_average(const PoolHeadParameters& p, cudaStream_t stream) {
  constexpr int kChunk = 16 / sizeof(Element);
  bool vector = true;
  for (const PathwayMap& map : {p.fast, p.slow}) {
    vector &= reinterpret_cast<uintptr_t>(map.x) % 16 == 0 && map.pixel_pitch % kChunk == 0;
    vector &= map.channels % kChunk == 0;
  }
  if (p.positions == 1) {
    if (vector) return launch_pool_head_average_tile<Element, true, 1>(p, stream);
    return launch_pool_head_average_tile<Element, false, 1>(p, stream);
  }
  if (vector) return launch_pool_head_average_tile<Element, true, 4>(p, stream);
  return launch_pool_head_average_tile<Element, false, 4>(p, stream);
}

// From the averages to the result, with elements of type Weight in the linear layer.
template <typename Weight>
void launch_pool_head_classify(const PoolHeadParameters& p, cudaStream_t stream) {
  const bool vector = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && p.features % (16 / sizeof(Weight)) == 0;
  const int64_t rows = int64_t(p.batch) * p.positions;
  const unsigned blocks = unsigned((rows + LinearTile::kRows - 1) / LinearTile::kRows) *
                          ((p.classes + LinearTile::kClasses - 1) / LinearTile::kClasses);
  const auto kernel = vector ? pool_head_linear_kernel<Weight, true> : pool_head_linear_kernel<Weight, false>;
  launch_kernel(kernel, blocks, 32 * LinearTile::kWarps, 0, stream, p);
  if (p.group == 0) return;
  launch_kernel(pool_head_softmax_kernel, unsigned(rows / p.group), kSoftmaxThreads, 0, stream, p);
}

}  // namespace slowfast_ext
