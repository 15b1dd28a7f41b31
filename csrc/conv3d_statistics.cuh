// A convolution that also reduces what it writes, tile by tile, to the statistics of batch norm: kernel, choice of the
// tile, launch. No plan splits the reduction of a tile: the layers that gain from statistics in the epilogue are bound
// by memory and have more tiles of pixels than any GPU has multiprocessors, and sums of splits would be read again, as
// the statistics' own pass reads y.
#pragma once

#include "conv3d_moments.cuh"
#include "conv3d_plan.cuh"

namespace slowfast_ext {

// The tiles of conv3d_bn_relu that suit many pixels, to compile no more than is of use.
template <typename Tile>
constexpr bool kHasStatistics = Tile::kPixels == 128;

template <typename Math, typename Tile, bool kVector>
__global__ void __launch_bounds__(Tile::kThreads, (kResidentBlocks<Math, Tile>))
    conv3d_statistics_kernel(const Conv3dParameters p, float2* moments) {
  convolve_tile<Math, Tile, kVector>(p, blockIdx.x, TileMoments{moments});
}

// The tile with which the busiest multiprocessor is done first.
inline TileShape plan_conv3d_statistics(const Conv3dParameters& p, int element_bytes, int multiprocessors) {
  TileShape best{};
  double best_clocks = 0;
  for_each_tile(copies_in_chunks(p, element_bytes), [&](auto tile, TileShape shape) {
    if (!kHasStatistics<decltype(tile)>) return;
    LaunchCost cost(element_bytes, multiprocessors);
    cost.add<decltype(tile)>(p, 1);
    if (best_clocks == 0 || cost.clocks() < best_clocks) best = shape, best_clocks = cost.clocks();
  });
  return best;
}

// Elements that `moments` must have room for.
inline int64_t moments_size(const Conv3dParameters& p, TileShape shape, int element_bytes) {
  int64_t size = 0;
  with_tile(shape, copies_in_chunks(p, element_bytes), [&](auto tile, auto) {
    using Tile = decltype(tile);
    size = (int64_t(p.pixels) + Tile::kPixels - 1) / Tile::kPixels * p.out_channels;
  });
  return size;
}

// The statistics are of one group.
template <typename Math>
void launch_conv3d_statistics(Conv3dParameters p, TileShape shape, float2* moments,
                              const MergeMoments::Results& statistics, cudaStream_t stream) {
  set_splits(p, 1, nullptr);
  with_tile(shape, copies_in_chunks(p, sizeof(typename Math::Element)), [&](auto tile, auto vector) {
    using Tile = decltype(tile);
    if constexpr (kHasStatistics<Tile>) {
      launch_kernel(conv3d_statistics_kernel<Math, Tile, decltype(vector)::value>, unsigned(count_tiles<Tile>(p)),
                    Tile::kThreads, Tile::kSharedBytes, stream, p, moments);
      const int blocks = (p.pixels + Tile::kPixels - 1) / Tile::kPixels;
      const BatchNormMergeParameters merge{moments, 1, blocks, p.out_channels, p.pixels, Tile::kPixels};
      launch_batch_norm_merge<MergeMoments>(merge, statistics, stream);
    }
  });
}

}  // namespace slowfast_ext
