// Which tiles a convolution has, and what a launch of one or more convolutions with a tile costs.
#pragma once

#include <type_traits>

#include "conv3d_tile.cuh"

namespace slowfast_ext {

enum class TileShape { k128x128, k128x64, k64x64, k128x32, k128x16 };

using LargeTile = Tile<128, 128, 2, 4, 3>;
using TallTile = Tile<128, 64, 2, 2, 4>;
using MediumTile = Tile<64, 64, 2, 2, 4>;
using NarrowTile = Tile<128, 32, 4, 1, 4>;
using ThinTile = Tile<128, 16, 4, 1, 4>;

// Calls function(tile, vector), the arguments of StageLoader as types, for a shape. Elements are gathered only by those
// two tiles that the few channels of such layers suit.
template <typename Function>
void with_tile(TileShape shape, bool vector, Function function) {
  if (!vector) {
    if (shape == TileShape::k128x16) return function(ThinTile{}, std::false_type{});
    return function(MediumTile{}, std::false_type{});
  }
  switch (shape) {
    case TileShape::k128x128:
      return function(LargeTile{}, std::true_type{});
    case TileShape::k128x64:
      return function(TallTile{}, std::true_type{});
    case TileShape::k128x32:
      return function(NarrowTile{}, std::true_type{});
    case TileShape::k128x16:
      return function(ThinTile{}, std::true_type{});
    default:
      return function(MediumTile{}, std::true_type{});
  }
}

// Calls function(tile, shape) for each tile that with_tile has.
template <typename Function>
void for_each_tile(bool vector, Function function) {
  function(ThinTile{}, TileShape::k128x16);
  function(MediumTile{}, TileShape::k64x64);
  if (!vector) return;
  function(NarrowTile{}, TileShape::k128x32);
  function(TallTile{}, TileShape::k128x64);
  function(LargeTile{}, TileShape::k128x128);
}

template <typename Tile>
int64_t count_tiles(const Conv3dParameters& p) {
  return (int64_t(p.pixels) + Tile::kPixels - 1) / Tile::kPixels *
         ((p.out_channels + Tile::kChannels - 1) / Tile::kChannels);
}

// Whether a tile's reduction can be shared by so many blocks: each has at least four steps.
inline bool can_split(const Conv3dParameters& p, int splits, int element_bytes) {
  const int steps = (p.reduction * element_bytes + 63) / 64;
  return splits == 1 || (splits <= 16 && splits * 4 <= steps);
}

// Clocks that a tile takes for each element of the reduction: the slowest of multiplying (1054 multiply-adds a clock on
// tensor cores in 16 bits, half of that in float32), ldmatrix (128 bytes a clock) and filling stages from L2 (24 bytes
// a clock and multiprocessor). From an H200's ceilings of mma.sync, shared memory and L2; only their ratios matter
// here.
template <typename Tile>
double clocks_per_term(const Conv3dParameters& p, int element_bytes) {
  const double multiply = double(Tile::kPixels) * Tile::kChannels / (element_bytes == 2 ? 1054 : 527);
  const double warps = Tile::kThreads / 32;
  const double ldmatrix = warps * (Tile::kWarpPixels + Tile::kWarpChannels) * element_bytes / 128.;
  const int channels = p.out_channels < Tile::kChannels ? p.out_channels : Tile::kChannels;
  const double fill = double(Tile::kPixels + channels) * element_bytes / 24;
  const double slowest = multiply > ldmatrix ? multiply : ldmatrix;
  return slowest > fill ? slowest : fill;
}

// Clocks until the busiest multiprocessor is done with all convolutions of a launch: blocks are dealt in rounds, each
// as long as the mean block, and no block is done sooner than it takes. A split writes and reads its sums once more.
class LaunchCost {
 public:
  LaunchCost(int element_bytes, int multiprocessors) : bytes_(element_bytes), multiprocessors_(multiprocessors) {}

  template <typename Tile>
  void add(const Conv3dParameters& p, int splits) {
    const double block = double(p.reduction) / splits * clocks_per_term<Tile>(p, bytes_) + 500;  // to fill and to drain
    const int64_t blocks = count_tiles<Tile>(p) * splits;
    blocks_ += blocks;
    all_ += blocks * block;
    longest_ = block > longest_ ? block : longest_;
    if (splits > 1) sums_ += 8. * splits * p.pixels * p.out_channels / (24. * multiprocessors_);
  }

  double clocks() const {
    const int64_t rounds = (blocks_ + multiprocessors_ - 1) / multiprocessors_;
    const double dealt = rounds * (all_ / blocks_);
    return (dealt > longest_ ? dealt : longest_) + (sums_ > 0 ? 3000 + sums_ : 0);  // 3000: the second launch
  }

 private:
  const int bytes_, multiprocessors_;
  int64_t blocks_ = 0;
  double all_ = 0, longest_ = 0, sums_ = 0;
};

// Floats that p.partial must have room for, aligned to 16 bytes.
inline int64_t partial_size(const Conv3dParameters& p, int splits) {
  return splits == 1 ? 0
                     : int64_t(splits) * p.pixels * ((p.out_channels + kOutputChunk - 1) / kOutputChunk * kOutputChunk);
}

inline void set_splits(Conv3dParameters& p, int splits, float* partial) {
  p.splits = splits;
  p.partial = partial;
  p.partial_pitch = (p.out_channels + kOutputChunk - 1) / kOutputChunk * kOutputChunk;
}

// Blocks of kReduceThreads threads that add the splits of p.
constexpr int kReduceThreads = 128;

inline unsigned count_reduce_blocks(const Conv3dParameters& p) {
  if (p.splits == 1) return 0;
  const int64_t chunks = int64_t(p.pixels) * p.partial_pitch / kOutputChunk;
  return unsigned((chunks + kReduceThreads - 1) / kReduceThreads);
}

}  // namespace slowfast_ext
