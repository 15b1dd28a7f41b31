// csrc/conv3d_bn_relu.cuh for NumPy: tensors come as arrays in (N, C, T, H, W) order with any strides, 16-bit types as
// their bits. With ONLY_BFLOAT16 the other types are left out, for builds that are made once and thrown away.
#include "conv3d_bn_relu.cuh"

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

using namespace slowfast_ext;
using emulator::Array;

namespace {

int64_t stride(const Array& array, int dimension) { return array.strides(dimension) / array.itemsize(); }

void conv3d_bn_relu(const std::string& math, const std::string& tile, const Array& x, const Array& weight,
                    const Array& bias, const Array& residual, const Array& y, std::array<int, 3> steps,
                    std::array<int, 3> padding, bool relu, int multiprocessors, int splits) {
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

  Conv3dPlan plan = plan_conv3d_bn_relu(p, x.itemsize(), multiprocessors);
  if (tile == "128x128") plan.tile = TileShape::k128x128;
  if (tile == "128x64") plan.tile = TileShape::k128x64;
  if (tile == "64x64") plan.tile = TileShape::k64x64;
  if (tile == "128x32") plan.tile = TileShape::k128x32;
  if (tile == "128x16") plan.tile = TileShape::k128x16;
  if (splits) plan.splits = splits;
  std::vector<float> partial(partial_size(p, plan.splits));
  if (math == "bfloat16") return launch_conv3d_bn_relu<HalfMath<bfloat16>>(p, plan, partial.data(), nullptr);
#ifndef ONLY_BFLOAT16
  if (math == "float16") return launch_conv3d_bn_relu<HalfMath<float16>>(p, plan, partial.data(), nullptr);
  if (math == "tf32") return launch_conv3d_bn_relu<Tf32Math>(p, plan, partial.data(), nullptr);
  if (math == "float32") return launch_conv3d_bn_relu<SplitTf32Math>(p, plan, partial.data(), nullptr);
#endif
  throw std::invalid_argument("not built for " + math);
}

}  // namespace

// Tile and splits chosen for a 16-bit layer whose operands are aligned.
std::pair<std::string, int> plan(int pixels, int in_channels, int out_channels, int taps, int multiprocessors) {
  Conv3dParameters p{};
  p.x_stride_c = 1;
  p.in_channels = in_channels;
  p.pixels = pixels;
  p.out_channels = out_channels;
  p.reduction = taps * in_channels;
  const Conv3dPlan plan = plan_conv3d_bn_relu(p, 2, multiprocessors);
  const char* names[] = {"128x128", "128x64", "64x64", "128x32", "128x16"};
  return {names[static_cast<int>(plan.tile)], plan.splits};
}

EMULATED_MODULE(module) {
  module.def("plan", &plan);
  module.def("conv3d_bn_relu", &conv3d_bn_relu);
}
