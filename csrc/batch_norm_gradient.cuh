// The two passes of batch norm, an addition and ReLU backwards; see batch_norm.cuh.
#pragma once

#include "batch_norm_tile.cuh"

namespace slowfast_ext {

// What a thread reads of a pixel, and g: the gradient where the ReLU let pass. That is where not y <= 0, so also where
// y is NaN, as in PyTorch.
template <typename Tile>
struct BatchNormGradientChunks {
  static constexpr int kChunk = Tile::kChunk;
  typename Tile::Chunk grad, x, y;

  static __device__ __forceinline__ BatchNormGradientChunks load(const BatchNormParameters& p, int pixel, int channel) {
    BatchNormGradientChunks chunks{};
    chunks.grad = load_pixel<Tile>(p.grad, pixel, channel);
    if (p.x.data) chunks.x = load_pixel<Tile>(p.x, pixel, channel);
    if (p.y.data) chunks.y = load_pixel<Tile>(p.y, pixel, channel);
    return chunks;
  }
  __device__ __forceinline__ void convert(const BatchNormParameters& p, const BatchNormAffine<kChunk>& affine,
                                          float (&g)[kChunk], float (&centered)[kChunk]) const {
    float y_given[kChunk];
    to_floats<Tile>(g, grad);
    to_floats<Tile>(centered, x);
    to_floats<Tile>(y_given, y);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float sign = p.y.data ? y_given[i] : affine(centered[i], i);
      if (p.relu && sign <= 0.f) g[i] = 0.f;
      centered[i] -= affine.mean[i];
    }
  }
};

// Of each channel of a block's rows {sum of g, sum of g * (x - mean)}; and g itself if it is the residual's gradient.
template <typename Element, bool kVector>
__global__ void __launch_bounds__(kBatchNormThreads) batch_norm_reduce_gradient_kernel(const BatchNormParameters p) {
  using Tile = BatchNormTile<Element, kVector>;
  using Chunks = BatchNormGradientChunks<Tile>;
  SHARED_MEMORY(shared);
  const BatchNormPlace<Tile> at(p, true);
  float2 sums[Tile::kChunk] = {};
  if (at.row < at.end) {
    const BatchNormAffine<Tile::kChunk> affine(p, at.group, at.channel);
    for_each_row<2>(
        p, at, [&](int pixel) { return Chunks::load(p, pixel, at.channel); },
        [&](const Chunks& chunks, int pixel) {
          float g[Tile::kChunk], centered[Tile::kChunk];
          chunks.convert(p, affine, g, centered);
          if (p.grad_residual.data) store_pixel<Tile>(p.grad_residual, pixel, at.channel, g);
#pragma unroll
          for (int i = 0; i < Tile::kChunk; ++i) {
            sums[i].x += g[i];
            sums[i].y += g[i] * centered[i];
          }
        });
  }
  merge_block<MergeSums>(p, at, sums, 0.f, shared);
}

template <typename Element, bool kVector>
__global__ void __launch_bounds__(kBatchNormThreads) batch_norm_apply_gradient_kernel(const BatchNormParameters p) {
  using Tile = BatchNormTile<Element, kVector>;
  using Chunks = BatchNormGradientChunks<Tile>;
  constexpr int kChunk = Tile::kChunk;
  const BatchNormPlace<Tile> at(p, false);
  if (at.row >= at.end) return;
  const BatchNormAffine<kChunk> affine(p, at.group, at.channel);
  // grad_x = scale * (g - mean_grad - slope * (x - mean)), with means over the elements of a group
  float mean_grad[kChunk], slope[kChunk], inverse_std[kChunk];
  const int64_t of_group = int64_t(at.group) * p.channels + at.channel;
  load_vector(mean_grad, p.sum_grad, of_group, 0.f);
  load_vector(slope, p.sum_grad_normalized, of_group, 0.f);
  load_vector(inverse_std, p.inverse_std, of_group, 0.f);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    mean_grad[i] *= p.inverse_count;
    slope[i] *= p.inverse_count * inverse_std[i];
  }
  for_each_row<2>(
      p, at, [&](int pixel) { return Chunks::load(p, pixel, at.channel); },
      [&](const Chunks& chunks, int pixel) {
        float g[kChunk], centered[kChunk], grad_x[kChunk];
        chunks.convert(p, affine, g, centered);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          // Not with factors of 0: what is infinite in x is none of a constant's business.
          grad_x[i] = p.sum_grad ? g[i] - mean_grad[i] - centered[i] * slope[i] : g[i];
          grad_x[i] *= affine.scale[i];
        }
        store_pixel<Tile>(p.grad_x, pixel, at.channel, grad_x);
      });
}

// From grad, x and perhaps y to the sums of g and of g * (x - mean) * inverse_std, (groups, channels), and perhaps
// grad_residual. p is planned.
template <typename Element>
void launch_batch_norm_reduce_gradient(const BatchNormParameters& p, float* sum_grad, float* sum_grad_normalized,
                                       cudaStream_t stream) {
  launch_batch_norm<Element>(p, batch_norm_reduce_gradient_kernel<Element, true>,
                             batch_norm_reduce_gradient_kernel<Element, false>, true, stream);
  launch_batch_norm_merge<MergeSums>(merge_parameters(p), {sum_grad, sum_grad_normalized, p.inverse_std}, stream);
}

// From grad, perhaps x and perhaps y to grad_x. p is planned.
template <typename Element>
void launch_batch_norm_apply_gradient(const BatchNormParameters& p, cudaStream_t stream) {
  launch_batch_norm<Element>(p, batch_norm_apply_gradient_kernel<Element, true>,
                             batch_norm_apply_gradient_kernel<Element, false>, false, stream);
}

}  // namespace slowfast_ext
