// Batch norm in training with an addition and ReLU, in four passes over memory: statistics, apply; backwards reduce and
// apply, which are in batch_norm_gradient.cuh.
//
// Launches: one a pass, and a small one more that merges what the blocks of a reduction found (batch_norm_merge.cuh).
// All arithmetic is in float32, rounded once when it is stored. The order of all sums is fixed by the shapes: no
// atomics, the same bits every time. Each pass reads each of its maps once; the sign that the ReLU decided by is
// computed again from x where there was no addition, so that y need not be kept.
//
// Memory traffic of the 106 batch norms of R50 4x16, 8 clips of 224 x 224 pixels in 16 bits, of which 32 have an
// addition. Beyond the floor, which is each map once, are the blocks' partials, written and read: 7 % of the smallest
// maps, where all of it stays in L2, less of larger ones.
//
//   pass             maps                               floor      moved
//   statistics       x                                  1.423 GB   1.484 GB (+4.3 %)
//   apply            x, residual; y                     3.552 GB   3.552 GB
//   reduce gradient  grad, x; grad_residual, y          4.258 GB   4.319 GB (+1.4 %)
//   apply gradient   grad or grad_residual, x; grad_x   4.269 GB   4.269 GB
#pragma once

#include "batch_norm_tile.cuh"

namespace slowfast_ext {

// Of each channel of a block's rows, Welford's mean and sum of squared deviations ("Note on a Method for Calculating
// Corrected Sums of Squares and Products", Technometrics 4, 1962).
template <typename Element, bool kVector>
__global__ void __launch_bounds__(kBatchNormThreads) batch_norm_statistics_kernel(const BatchNormParameters p) {
  using Tile = BatchNormTile<Element, kVector>;
  using Chunk = typename Tile::Chunk;
  SHARED_MEMORY(shared);
  const BatchNormPlace<Tile> at(p, true);
  float2 moments[Tile::kChunk] = {};
  float count = 0.f;
  for_each_row<4>(
      p, at, [&](int pixel) { return load_pixel<Tile>(p.x, pixel, at.channel); },
      [&](const Chunk& chunk, int) {
        float x[Tile::kChunk];
        to_floats<Tile>(x, chunk);
        count += 1.f;
        const float share = 1.f / count;
#pragma unroll
        for (int i = 0; i < Tile::kChunk; ++i) {
          const float delta = x[i] - moments[i].x;
          moments[i].x += delta * share;
          moments[i].y += delta * (x[i] - moments[i].x);
        }
      });
  merge_block<MergeMoments>(p, at, moments, count, shared);
}

template <typename Element, bool kVector>
__global__ void __launch_bounds__(kBatchNormThreads) batch_norm_apply_kernel(const BatchNormParameters p) {
  using Tile = BatchNormTile<Element, kVector>;
  struct Loaded {
    typename Tile::Chunk x, residual;
  };
  const BatchNormPlace<Tile> at(p, false);
  if (at.row >= at.end) return;
  const BatchNormAffine<Tile::kChunk> affine(p, at.group, at.channel);
  for_each_row<4>(
      p, at,
      [&](int pixel) {
        Loaded loaded{};
        loaded.x = load_pixel<Tile>(p.x, pixel, at.channel);
        if (p.residual.data) loaded.residual = load_pixel<Tile>(p.residual, pixel, at.channel);
        return loaded;
      },
      [&](const Loaded& loaded, int pixel) {
        float x[Tile::kChunk], residual[Tile::kChunk], y[Tile::kChunk];
        to_floats<Tile>(x, loaded.x);
        to_floats<Tile>(residual, loaded.residual);
#pragma unroll
        for (int i = 0; i < Tile::kChunk; ++i) {
          y[i] = affine(x[i], i);
          if (p.residual.data) y[i] += residual[i];
          if (p.relu) y[i] = y[i] <= 0.f ? 0.f : y[i];  // NaN stays
        }
        store_pixel<Tile>(p.y, pixel, at.channel, y);
      });
}

// From x to the statistics, of no rows mean and variance 0. p is planned.
template <typename Element>
void launch_batch_norm_statistics(const BatchNormParameters& p, const MergeMoments::Results& statistics,
                                  cudaStream_t stream) {
  launch_batch_norm<Element>(p, batch_norm_statistics_kernel<Element, true>,
                             batch_norm_statistics_kernel<Element, false>, true, stream);
  launch_batch_norm_merge<MergeMoments>(merge_parameters(p), statistics, stream);
}

// From x, and perhaps a residual, to y, which may be one of them. p is planned.
template <typename Element>
void launch_batch_norm_apply(const BatchNormParameters& p, cudaStream_t stream) {
  launch_batch_norm<Element>(p, batch_norm_apply_kernel<Element, true>, batch_norm_apply_kernel<Element, false>, false,
                             stream);
}

}  // namespace slowfast_ext
