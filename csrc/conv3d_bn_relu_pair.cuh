// Two convolutions of one x in one launch, two where a reduction is split: kernels, choice of the tile, launch. One
// tile serves both convolutions; each splits its reduction as far as suits it.
//
// The blocks of the second convolution are spread evenly among those of the first, so that after any part of the grid
// both have come through the same part of x, whatever their strides: it is read from memory once and then from L2.
#pragma once

#include "conv3d_plan.cuh"

namespace slowfast_ext {

struct Conv3dPairParameters {
  Conv3dParameters problems[2];
  uint32_t second_share;         // blocks of the second problem among all, in units of 2^-32, rounded up
  unsigned first_reduce_blocks;  // blocks of the second launch that add splits of the first problem
};

inline uint32_t share_of_second(uint64_t first_blocks, uint64_t second_blocks) {
  const uint64_t blocks = first_blocks + second_blocks;
  return static_cast<uint32_t>(((second_blocks << 32) + blocks - 1) / blocks);
}

struct PairBlock {
  int problem;
  unsigned block;  // within the problem
};

// Of the first b blocks, floor(b * share / 2^32) are of the second problem: one more or none with each block, and all
// of them at the end, as the rounding of the share adds less than one.
__device__ __forceinline__ PairBlock pair_block(const Conv3dPairParameters& pair, unsigned block) {
  const unsigned before = uint64_t(block) * pair.second_share >> 32;
  const unsigned through = (uint64_t(block) + 1) * pair.second_share >> 32;
  if (before == through) return {0, block - before};
  return {1, before};
}

// As for one convolution, but for the tile that would spill.
template <typename Math, typename Tile>
constexpr int kPairResidentBlocks = kResidentBlocks<Math, Tile>;
template <>
inline constexpr int kPairResidentBlocks<SplitTf32Math, TallTile> = 2;

template <typename Math, typename Tile, bool kVector>
__global__ void __launch_bounds__(Tile::kThreads, (kPairResidentBlocks<Math, Tile>))
    conv3d_bn_relu_pair_kernel(const __grid_constant__ Conv3dPairParameters pair) {
  const PairBlock at = pair_block(pair, blockIdx.x);
  // Two copies of the code, whose operands are constants at fixed addresses: an index into the parameters would cost
  // registers, and loads in the main loop.
  if (at.problem == 0) {
    convolve_tile<Math, Tile, kVector>(pair.problems[0], at.block);
  } else {
    convolve_tile<Math, Tile, kVector>(pair.problems[1], at.block);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    conv3d_bn_relu_pair_reduce_kernel(const __grid_constant__ Conv3dPairParameters pair) {
  const unsigned problem = blockIdx.x >= pair.first_reduce_blocks;
  const unsigned block = problem ? blockIdx.x - pair.first_reduce_blocks : blockIdx.x;
  reduce_splits<Element>(pair.problems[problem], int64_t(block) * kReduceThreads + threadIdx.x);
}

// What is launched: a tile for both, and how many blocks share the reduction of each one's tiles.
struct Conv3dPairPlan {
  TileShape tile;
  int splits[2];
};

// Whether both convolutions fill their stages by asynchronous copies, as one kernel must do it.
inline bool copies_in_chunks(const Conv3dParameters (&problems)[2], int element_bytes) {
  return copies_in_chunks(problems[0], element_bytes) && copies_in_chunks(problems[1], element_bytes);
}

// The plan in which the busiest multiprocessor is done first.
inline Conv3dPairPlan plan_conv3d_bn_relu_pair(const Conv3dParameters (&problems)[2], int element_bytes,
                                               int multiprocessors) {
  Conv3dPairPlan best{};
  double best_clocks = 0;
  for_each_tile(copies_in_chunks(problems, element_bytes), [&](auto tile, TileShape shape) {
    for (int first = 1; can_split(problems[0], first, element_bytes); first *= 2) {
      for (int second = 1; can_split(problems[1], second, element_bytes); second *= 2) {
        LaunchCost cost(element_bytes, multiprocessors);
        cost.add<decltype(tile)>(problems[0], first);
        cost.add<decltype(tile)>(problems[1], second);
        const double clocks = cost.clocks();
        if (best_clocks == 0 || clocks < best_clocks) best = {shape, {first, second}}, best_clocks = clocks;
      }
    }
  });
  return best;
}

// Floats for the sums of both, those of the first convolution first.
inline int64_t partial_size(const Conv3dParameters (&problems)[2], const Conv3dPairPlan& plan) {
  return partial_size(problems[0], plan.splits[0]) + partial_size(problems[1], plan.splits[1]);
}

// `partial`: partial_size() floats.
template <typename Math>
void launch_conv3d_bn_relu_pair(const Conv3dParameters (&problems)[2], const Conv3dPairPlan& plan, float* partial,
                                cudaStream_t stream) {
  using Element = typename Math::Element;
  Conv3dPairParameters pair{{problems[0], problems[1]}, 0, 0};
  set_splits(pair.problems[0], plan.splits[0], partial);
  set_splits(pair.problems[1], plan.splits[1], partial + partial_size(problems[0], plan.splits[0]));
  with_tile(plan.tile, copies_in_chunks(problems, sizeof(Element)), [&](auto tile, auto vector) {
    using Tile = decltype(tile);
    const int64_t first_blocks = count_tiles<Tile>(problems[0]) * plan.splits[0];
    const int64_t second_blocks = count_tiles<Tile>(problems[1]) * plan.splits[1];
    pair.second_share = share_of_second(first_blocks, second_blocks);
    launch_kernel(conv3d_bn_relu_pair_kernel<Math, Tile, decltype(vector)::value>,
                  unsigned(first_blocks + second_blocks), Tile::kThreads, Tile::kSharedBytes, stream, pair);
  });
  pair.first_reduce_blocks = count_reduce_blocks(pair.problems[0]);
  const unsigned reduce_blocks = pair.first_reduce_blocks + count_reduce_blocks(pair.problems[1]);
  if (reduce_blocks == 0) return;
  launch_kernel(conv3d_bn_relu_pair_reduce_kernel<Element>, reduce_blocks, unsigned(kReduceThreads), size_t(0), stream,
                pair);
}

}  // namespace slowfast_ext
