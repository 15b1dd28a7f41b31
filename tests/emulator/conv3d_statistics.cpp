// csrc/conv3d_statistics.cuh for NumPy.
#include "conv3d_statistics.cuh"

#include <vector>

#include "conv3d_arrays.h"

using namespace slowfast_ext;

namespace {

// `mean`, `variance`, `inverse_std`: (out_channels).
void conv3d_statistics(const std::string& math, const std::string& tile, const Array& x, const Array& weight,
                       const Array& y, const Array& mean, const Array& variance, const Array& inverse_std,
                       std::array<int, 3> steps, std::array<int, 3> padding, float eps, int multiprocessors) {
  const Conv3dParameters p = conv3d_parameters(x, weight, Array(), Array(), y, steps, padding, false);
  const TileShape shape = tile_named(tile, plan_conv3d_statistics(p, x.itemsize(), multiprocessors));
  std::vector<float2> moments(moments_size(p, shape, x.itemsize()));
  const MergeMoments::Results statistics{static_cast<float*>(mean.mutable_data()),
                                         static_cast<float*>(variance.mutable_data()),
                                         static_cast<float*>(inverse_std.mutable_data()), eps};
  with_math(math, [&](auto math) {
    launch_conv3d_statistics<decltype(math)>(p, shape, moments.data(), statistics, nullptr);
  });
}

// The tile chosen for a 16-bit layer whose operands are aligned.
std::string plan(int pixels, int in_channels, int out_channels, int taps, int multiprocessors) {
  const Conv3dParameters p = conv3d_layer(pixels, in_channels, out_channels, taps);
  return kTileNames[static_cast<int>(plan_conv3d_statistics(p, 2, multiprocessors))];
}

}  // namespace

EMULATED_MODULE(module) {
  module.def("plan", &plan);
  module.def("conv3d_statistics", &conv3d_statistics);
}
