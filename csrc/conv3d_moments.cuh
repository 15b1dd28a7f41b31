// The first two moments of each channel over a tile of pixels, of the outputs as they are stored: x the mean, y the sum
// of squared deviations from it. A warp has its sums in registers and goes over them twice, first for the mean, so that
// nothing is lost where that is much larger than the deviations; warps are merged in their order. No atomics, the same
// bits every time.
#pragma once

#include "batch_norm_merge.cuh"

namespace slowfast_ext {

// Of kRows rows those that exist, if `left` do from the first on.
template <int kRows>
__device__ __forceinline__ int count_rows(int left) {
  return left < 0 ? 0 : left < kRows ? left : kRows;
}

// The sum over the lanes that hold the same columns of an accumulator.
__device__ __forceinline__ float sum_rows(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// Moments of the columns of a warp's accumulators over the first `rows` rows; undefined for none.
template <typename Element, int kRowFragments, int kColumnFragments>
__device__ __forceinline__ void warp_moments(const float (&sum)[kRowFragments][kColumnFragments][4], int rows,
                                             float2* moments) {
  const int lane = threadIdx.x % 32;
  const float inverse = 1.f / rows;
#pragma unroll
  for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      float values[kRowFragments * 2];  // rows lane / 4, lane / 4 + 8, ...
      float total = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < kRowFragments * 2; ++i) {
        values[i] = to_float(from_float<Element>(sum[i / 2][j][i % 2 * 2 + column]));
        if (lane / 4 + i * 8 < rows) total += values[i];
      }
      const float mean = sum_rows(total) * inverse;
#pragma unroll
      for (int i = 0; i < kRowFragments * 2; ++i) {
        const float deviation = values[i] - mean;
        if (lane / 4 + i * 8 < rows) squares += deviation * deviation;
      }
      squares = sum_rows(squares);
      if (lane < 4) moments[j * 8 + lane * 2 + column] = make_float2(mean, squares);
    }
  }
}

// What convolve_tile does besides: {mean, squared deviations} of each channel of a tile.
struct TileMoments {
  static constexpr bool kWanted = true;
  float2* moments;  // (tiles of pixels, channels)

  // Those of a warp's sums, at warp_pixel and warp_channel of a tile that has `left` pixels or more.
  template <typename Element, typename Tile>
  __device__ __forceinline__ void add(const float (&sum)[Tile::kWarpPixels / 16][Tile::kWarpChannels / 8][4],
                                      int warp_pixel, int warp_channel, int left, unsigned char* shared) const {
    const int rows = count_rows<Tile::kWarpPixels>(left - warp_pixel);
    float2* of_row = of_warps<Tile>(shared) + warp_pixel / Tile::kWarpPixels * Tile::kChannels;
    warp_moments<Element>(sum, rows, of_row + warp_channel);
  }

  // Merges the warps of the same channels.
  template <typename Tile>
  __device__ __forceinline__ void store(int tile, int first_channel, int channels, int left,
                                        unsigned char* shared) const {
    __syncthreads();  // all warps have added theirs
    const int channel = first_channel + threadIdx.x;
    if (threadIdx.x >= Tile::kChannels || channel >= channels) return;
    const float2* of_warp = of_warps<Tile>(shared) + threadIdx.x;
    float2 all = *of_warp;
#pragma unroll
    for (int first = Tile::kWarpPixels; first < Tile::kPixels; first += Tile::kWarpPixels) {
      const int rows = count_rows<Tile::kWarpPixels>(left - first);
      if (rows == 0) break;
      of_warp += Tile::kChannels;
      MergeMoments::merge(all, *of_warp, first, rows);
    }
    moments[int64_t(tile) * channels + channel] = all;
  }

 private:
  // (rows of warps, channels of the tile), behind the sums.
  template <typename Tile>
  static __device__ __forceinline__ float2* of_warps(unsigned char* shared) {
    constexpr int kBytes = Tile::kPixels / Tile::kWarpPixels * Tile::kChannels * int(sizeof(float2));
    static_assert(Tile::kSlabBytes + kBytes <= Tile::kSharedBytes, "they reuse the stages");
    return reinterpret_cast<float2*>(shared + Tile::kSlabBytes);
  }
};

}  // namespace slowfast_ext
