// csrc/conv3d_bn_relu.cuh for NumPy.
#include "conv3d_bn_relu.cuh"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "conv3d_arrays.h"

using namespace slowfast_ext;

namespace {

void conv3d_bn_relu(const std::string& math, const std::string& tile, const py::array& x, const py::array& weight,
                    const py::object& bias, const py::object& residual, py::array y, std::array<int, 3> steps,
                    std::array<int, 3> padding, bool relu, int multiprocessors, int splits) {
  const Conv3dParameters p = conv3d_parameters(x, weight, bias, residual, y, steps, padding, relu);
  Conv3dPlan plan = plan_conv3d_bn_relu(p, x.itemsize(), multiprocessors);
  plan.tile = tile_named(tile, plan.tile);
  if (splits) plan.splits = splits;
  std::vector<float> partial(partial_size(p, plan.splits));
  with_math(math, [&](auto math) { launch_conv3d_bn_relu<decltype(math)>(p, plan, partial.data(), nullptr); });
}

// Of the last launch: ldmatrix instructions, and those of their 8x8 matrices that met a bank twice.
std::pair<uint64_t, uint64_t> statistics() {
  return {emulator::statistics().ldmatrix, emulator::statistics().bank_conflicts};
}

// Tile and splits chosen for a 16-bit layer whose operands are aligned.
std::pair<std::string, int> plan(int pixels, int in_channels, int out_channels, int taps, int multiprocessors) {
  const Conv3dPlan plan =
      plan_conv3d_bn_relu(conv3d_layer(pixels, in_channels, out_channels, taps), 2, multiprocessors);
  return {kTileNames[static_cast<int>(plan.tile)], plan.splits};
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, module) {
  module.def("plan", &plan);
  module.def("conv3d_bn_relu", &conv3d_bn_relu);
  module.def("statistics", &statistics);
}
