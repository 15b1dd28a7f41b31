// The parameters of a convolution from arrays: tensors in (N, C, T, H, W) order with any strides, 16-bit types as their
// bits.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "conv3d_plan.cuh"
#include "module.h"

namespace slowfast_ext {

using emulator::Array;

inline int64_t stride(const Array& array, int dimension) { return array.strides(dimension) / array.itemsize(); }

inline Conv3dParameters conv3d_parameters(const Array& x, const Array& weight, const Array& bias, const Array& residual,
                                          const Array& y, const std::array<int, 3>& steps,
                                          const std::array<int, 3>& padding, bool relu) {
  Conv3dParameters p{};
  p.x = x.data();
  p.weight = weight.data();
  p.bias = static_cast<const float*>(bias.data());
  p.y = y.mutable_data();
  p.y_pitch = stride(y, 4);
  if (!residual.is_none()) {
    p.residual = residual.data();
    p.residual_pitch = stride(residual, 4);
  }
  p.x_stride_n = stride(x, 0);
  p.x_stride_c = stride(x, 1);
  p.x_stride_t = stride(x, 2);
  p.x_stride_h = stride(x, 3);
  p.x_stride_w = stride(x, 4);
  p.in_channels = x.shape(1);
  p.in_t = x.shape(2);
  p.in_h = x.shape(3);
  p.in_w = x.shape(4);
  p.out_channels = y.shape(1);
  p.out_t = y.shape(2);
  p.out_h = y.shape(3);
  p.out_w = y.shape(4);
  p.kernel_t = weight.shape(2);
  p.kernel_h = weight.shape(3);
  p.kernel_w = weight.shape(4);
  p.stride_t = steps[0];
  p.stride_h = steps[1];
  p.stride_w = steps[2];
  p.padding_t = padding[0];
  p.padding_h = padding[1];
  p.padding_w = padding[2];
  p.pixels = y.shape(0) * y.shape(2) * y.shape(3) * y.shape(4);
  p.reduction = p.kernel_t * p.kernel_h * p.kernel_w * p.in_channels;
  p.relu = relu;
  p.wide = is_wide(p, x.itemsize());
  return p;
}

// As in a network, for a plan only: channels-last and aligned, with no memory behind it.
inline Conv3dParameters conv3d_layer(int pixels, int in_channels, int out_channels, int taps) {
  Conv3dParameters p{};
  p.x_stride_c = 1;
  p.in_channels = in_channels;
  p.pixels = pixels;
  p.out_channels = out_channels;
  p.reduction = taps * in_channels;
  return p;
}

constexpr const char* kTileNames[] = {"128x128", "128x64", "64x64", "128x32", "128x16"};  // in the order of TileShape

inline TileShape tile_named(const std::string& name, TileShape otherwise) {
  for (int i = 0; i < 5; ++i) {
    if (name == kTileNames[i]) return static_cast<TileShape>(i);
  }
  return otherwise;
}

// With ONLY_BFLOAT16 the other types are left out, for builds that are made once and thrown away.
template <typename Function>
void with_math(const std::string& name, Function function) {
  if (name == "bfloat16") return function(HalfMath<bfloat16>{});
#ifndef ONLY_BFLOAT16
  if (name == "float16") return function(HalfMath<float16>{});
  if (name == "tf32") return function(Tf32Math{});
  if (name == "float32") return function(SplitTf32Math{});
#endif
  throw std::invalid_argument("not built for " + name);
}

}  // namespace slowfast_ext
