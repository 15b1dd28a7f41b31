// csrc/conv3d_bn_relu.cuh for NumPy.
#include "conv3d_bn_relu.cuh"

#include <utility>
#include <vector>

#include "conv3d_arrays.h"

using namespace slowfast_ext;

namespace {

void conv3d_bn_relu(const std::string& math, const std::string& tile, const Array& x, const Array& weight,
                    const Array& bias, const Array& residual, const Array& y, std::array<int, 3> steps,
                    std::array<int, 3> padding, bool relu, int multiprocessors, int splits) {
  const Conv3dParameters p = conv3d_parameters(x, weight, bias, residual, y, steps, padding, relu);
  Conv3dPlan plan = plan_conv3d_bn_relu(p, x.itemsize(), multiprocessors);
  plan.tile = tile_named(tile, plan.tile);
  if (splits) plan.splits = splits;
  std::vector<float> partial(partial_size(p, plan.splits));
  with_math(math, [&](auto math) { launch_conv3d_bn_relu<decltype(math)>(p, plan, partial.data(), nullptr); });
}

// Tile and splits chosen for a 16-bit layer whose operands are aligned.
std::pair<std::string, int> plan(int pixels, int in_channels, int out_channels, int taps, int multiprocessors) {
  const Conv3dPlan plan =
      plan_conv3d_bn_relu(conv3d_layer(pixels, in_channels, out_channels, taps), 2, multiprocessors);
  return {kTileNames[static_cast<int>(plan.tile)], plan.splits};
}

}  // namespace

EMULATED_MODULE(module) {
  module.def("plan", &plan);
  module.def("conv3d_bn_relu", &conv3d_bn_relu);
}
