// One convolution in one launch, two where its reduction is split: kernels, choice of the tile, launch.
#pragma once

#include "conv3d_plan.cuh"

namespace slowfast_ext {

template <typename Math, typename Tile, bool kVector>
__global__ void __launch_bounds__(Tile::kThreads, (kResidentBlocks<Math, Tile>))
    conv3d_bn_relu_kernel(const Conv3dParameters p) {
  convolve_tile<Math, Tile, kVector>(p, blockIdx.x);
}

template <typename Element>
__global__ void __launch_bounds__(kReduceThreads) conv3d_bn_relu_reduce_kernel(const Conv3dParameters p) {
  reduce_splits<Element>(p, int64_t(blockIdx.x) * kReduceThreads + threadIdx.x);
}

// What is launched: a tile, and how many blocks share the reduction of each.
struct Conv3dPlan {
  TileShape tile;
  int splits;
};

// The plan in which the busiest multiprocessor is done first.
inline Conv3dPlan plan_conv3d_bn_relu(const Conv3dParameters& p, int element_bytes, int multiprocessors) {
  Conv3dPlan best{};
  double best_clocks = 0;
  for_each_tile(copies_in_chunks(p, element_bytes), [&](auto tile, TileShape shape) {
    for (int splits = 1; can_split(p, splits, element_bytes); splits *= 2) {
      LaunchCost cost(element_bytes, multiprocessors);
      cost.add<decltype(tile)>(p, splits);
      const double clocks = cost.clocks();
      if (best_clocks == 0 || clocks < best_clocks) best = {shape, splits}, best_clocks = clocks;
    }
  });
  return best;
}

// `partial`: partial_size() floats.
template <typename Math>
void launch_conv3d_bn_relu(Conv3dParameters p, const Conv3dPlan& plan, float* partial, cudaStream_t stream) {
  using Element = typename Math::Element;
  set_splits(p, plan.splits, partial);
  with_tile(plan.tile, copies_in_chunks(p, sizeof(Element)), [&](auto tile, auto vector) {
    using Tile = decltype(tile);
    launch_kernel(conv3d_bn_relu_kernel<Math, Tile, decltype(vector)::value>, unsigned(count_tiles<Tile>(p) * p.splits),
                  Tile::kThreads, Tile::kSharedBytes, stream, p);
  });
  if (p.splits == 1) return;
  launch_kernel(conv3d_bn_relu_reduce_kernel<Element>, count_reduce_blocks(p), unsigned(kReduceThreads), size_t(0),
                stream, p);
}

}  // namespace slowfast_ext
