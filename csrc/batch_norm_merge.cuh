// What blocks found out about their rows, each channel two numbers, made one result: the second launch of whatever sums
// over all pixels of a group of clips.
//
// Partials are float2[group][block][channel]. A block covers rows_per_block consecutive rows, which are the pixels of
// the group in the order of its clips, the last block what remains. For statistics they are {mean, sum of the squared
// deviations from it}. All are merged in an order that the sizes fix: no atomics, the same bits every time.
#pragma once

#include "device/ptx.h"

namespace slowfast_ext {

// {mean, squared deviations} of `count` values, and of others: Chan, Golub and LeVeque, "Algorithms for Computing the
// Sample Variance", The American Statistician 37 (1983). No difference of large numbers, whatever the mean.
struct MergeMoments {
  static __device__ __forceinline__ void merge(float2& into, float2 other, float count, float other_count) {
    const float share = other_count > 0.f ? other_count / (count + other_count) : 0.f;
    const float delta = other.x - into.x;
    into.x += delta * share;
    into.y += other.y + delta * delta * (count * share);
  }
  // What becomes of them, each (groups, channels). Of nothing the mean and the biased variance are 0.
  struct Results {
    float *mean, *variance, *inverse_std;
    float eps;  // inverse_std = 1 / sqrt(variance + eps)

    __device__ __forceinline__ void store(int64_t at, float2 moments, float count) const {
      const float biased = count > 0.f ? moments.y / count : 0.f;
      mean[at] = moments.x;
      variance[at] = biased;
      inverse_std[at] = 1.f / sqrtf(biased + eps);
    }
  };
};

struct MergeSums {
  static __device__ __forceinline__ void merge(float2& into, float2 other, float, float) {
    into.x += other.x;
    into.y += other.y;
  }
  struct Results {
    float *first, *second;  // (groups, channels)
    const float* factor;    // (groups, channels), of the second

    __device__ __forceinline__ void store(int64_t at, float2 sums, float) const {
      first[at] = sums.x;
      second[at] = sums.y * factor[at];
    }
  };
};

__device__ __forceinline__ float2 shuffle_xor(float2 value, int distance) {
  const float x = __shfl_xor_sync(~0u, value.x, distance);
  return make_float2(x, __shfl_xor_sync(~0u, value.y, distance));
}

struct BatchNormMergeParameters {
  const float2* partials;
  int groups, blocks, channels;
  int rows, rows_per_block;  // of a group, of a block
};

struct BatchNormMergeTile {
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 4;                  // 32 bytes of partials, so that requests fill their sectors
  static constexpr int kParts = kThreads / kChannels;  // of the partials of a channel, merged side by side
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = kWarps * (kChannels * sizeof(float2) + sizeof(float));

  static __host__ __device__ int slices(int channels) { return (channels + kChannels - 1) / kChannels; }
};

// A block of threads merges all partials of kChannels channels of a group.
template <typename Merge>
__global__ void __launch_bounds__(BatchNormMergeTile::kThreads)
    batch_norm_merge_kernel(const BatchNormMergeParameters p, const typename Merge::Results results) {
  using Tile = BatchNormMergeTile;
  SHARED_MEMORY(shared);
  float2* const warp_merged = reinterpret_cast<float2*>(shared);  // (warp, channel)
  float* const warp_count = reinterpret_cast<float*>(warp_merged + Tile::kWarps * Tile::kChannels);

  const int slices = Tile::slices(p.channels), group = blockIdx.x / slices;
  const int first_channel = blockIdx.x % slices * Tile::kChannels;
  const int channel = first_channel + threadIdx.x % Tile::kChannels;
  float2 merged = make_float2(0.f, 0.f);
  float count = 0.f;
  if (channel < p.channels) {
    const float2* const partials = p.partials + int64_t(group) * p.blocks * p.channels + channel;
#pragma unroll 4
    for (int block = threadIdx.x / Tile::kChannels; block < p.blocks; block += Tile::kParts) {
      const float rows = static_cast<float>(min(p.rows_per_block, p.rows - block * p.rows_per_block));
      Merge::merge(merged, partials[int64_t(block) * p.channels], count, rows);
      count += rows;
    }
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = Tile::kChannels; distance < 32; distance *= 2) {
    const float other_count = __shfl_xor_sync(~0u, count, distance);
    Merge::merge(merged, shuffle_xor(merged, distance), count, other_count);
    count += other_count;
  }
  if (lane < Tile::kChannels) warp_merged[warp * Tile::kChannels + lane] = merged;
  if (lane == 0) warp_count[warp] = count;
  __syncthreads();
  if (threadIdx.x >= Tile::kChannels || channel >= p.channels) return;
#pragma unroll
  for (int other = 1; other < Tile::kWarps; ++other) {
    Merge::merge(merged, warp_merged[other * Tile::kChannels + lane], count, warp_count[other]);
    count += warp_count[other];
  }
  results.store(int64_t(group) * p.channels + channel, merged, count);
}

template <typename Merge>
void launch_batch_norm_merge(const BatchNormMergeParameters& p, const typename Merge::Results& results,
                             cudaStream_t stream) {
  using Tile = BatchNormMergeTile;
  launch_kernel(batch_norm_merge_kernel<Merge>, unsigned(p.groups) * Tile::slices(p.channels), Tile::kThreads,
                Tile::kSharedBytes, stream, p, results);
}

}  // namespace slowfast_ext
