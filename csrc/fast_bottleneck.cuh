// Which tiles fast_bottleneck has, and how a launch shares its output among thread blocks.
#pragma once

#include "fast_bottleneck_block.cuh"

namespace slowfast_ext {

// Calls function(tile) with the largest tile for a kind of block that fits into the shared memory that a thread block
// may have; false if there is none.
template <typename Function>
bool with_fast_bottleneck_tile(int in_channels, int channels, int stride, int shared_memory, Function function) {
  const auto serve = [&](auto tile) {
    using Tile = decltype(tile);
    if (in_channels != Tile::kInChannels || channels != Tile::kChannels || stride != Tile::kStride) return false;
    if (FastBottleneckBlock<bfloat16, Tile>::kSharedBytes > shared_memory) return false;
    function(tile);
    return true;
  };
  return serve(FastBottleneckTile<8, 8, 1, 8, 16, 4>{}) || serve(FastBottleneckTile<32, 8, 1, 8, 16, 4>{}) ||
         serve(FastBottleneckTile<32, 16, 2, 8, 8, 4>{}) || serve(FastBottleneckTile<64, 16, 1, 8, 16, 4>{}) ||
         serve(FastBottleneckTile<64, 32, 2, 8, 8, 8>{}) || serve(FastBottleneckTile<64, 32, 2, 4, 8, 4>{}) ||
         serve(FastBottleneckTile<128, 32, 1, 8, 16, 4>{}) || serve(FastBottleneckTile<128, 32, 1, 8, 8, 4>{});
}

// Frames of y per thread block, which steps through two more. The time of a multiprocessor is that of the steps of all
// its thread blocks, but fewer than `busy` of them leave it waiting and take as long as `busy` do. The least time, and
// with equal times the fewest chunks, which read least.
inline int choose_frames_per_chunk(int frames, int64_t tiles, int multiprocessors, int busy) {
  int best = frames;
  int64_t least = INT64_MAX;
  for (int chunks = 1; chunks <= frames; ++chunks) {
    const int per_chunk = (frames + chunks - 1) / chunks;
    const int64_t blocks = tiles * ((frames + per_chunk - 1) / per_chunk);
    const int64_t steps = max((blocks + multiprocessors - 1) / multiprocessors, int64_t(busy)) * (per_chunk + 2);
    if (steps < least) {
      least = steps;
      best = per_chunk;
    }
  }
  return best;
}

// Fills in how thread blocks share the output; frames_per_chunk is chosen if 0. `shared_memory` is what a thread block
// may have. False if no tile serves the block.
template <typename Element>
bool launch_fast_bottleneck(FastBottleneckParameters p, int in_channels, int channels, int stride, int multiprocessors,
                            int shared_memory, cudaStream_t stream) {
  return with_fast_bottleneck_tile(in_channels, channels, stride, shared_memory, [&](auto tile) {
    using Tile = decltype(tile);
    constexpr int kSharedBytes = FastBottleneckBlock<Element, Tile>::kSharedBytes;
    p.tiles_h = (p.out_h + Tile::kHeight - 1) / Tile::kHeight;
    p.tiles_w = (p.out_w + Tile::kWidth - 1) / Tile::kWidth;
    const int64_t tiles = int64_t(p.batch) * p.tiles_h * p.tiles_w;
    if (p.frames_per_chunk == 0) {
      const int resident = min(4, 227 * 1024 / (kSharedBytes + 1024));  // where there is most shared memory
      p.frames_per_chunk = choose_frames_per_chunk(p.frames, tiles, multiprocessors, (resident + 1) / 2);
    }
    p.chunks = (p.frames + p.frames_per_chunk - 1) / p.frames_per_chunk;
    const auto kernel = fast_bottleneck_kernel<Element, Tile>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    launch_kernel(kernel, static_cast<unsigned>(tiles * p.chunks), Tile::kThreads, kSharedBytes, stream, p);
  });
}

}  // namespace slowfast_ext
