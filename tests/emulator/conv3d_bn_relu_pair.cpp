// csrc/conv3d_bn_relu_pair.cuh for NumPy.
#include "conv3d_bn_relu_pair.cuh"

#include <utility>
#include <vector>

#include "conv3d_arrays.h"

using namespace slowfast_ext;

namespace {

// Of each convolution weight, bias, y, stride, padding and relu. Splits of 0 are those that the cost model says.
void conv3d_bn_relu_pair(const std::string& math, const std::string& tile, const Array& x, const Array& weight,
                         const Array& bias, const Array& y, std::array<int, 3> steps, std::array<int, 3> padding,
                         bool relu, const Array& weight_shortcut, const Array& bias_shortcut, const Array& shortcut,
                         std::array<int, 3> steps_shortcut, std::array<int, 3> padding_shortcut, bool relu_shortcut,
                         int multiprocessors, std::array<int, 2> splits) {
  const Conv3dParameters problems[2] = {conv3d_parameters(x, weight, bias, {}, y, steps, padding, relu),
                                        conv3d_parameters(x, weight_shortcut, bias_shortcut, {}, shortcut,
                                                          steps_shortcut, padding_shortcut, relu_shortcut)};
  Conv3dPairPlan plan = plan_conv3d_bn_relu_pair(problems, x.itemsize(), multiprocessors);
  plan.tile = tile_named(tile, plan.tile);
  for (int i = 0; i < 2; ++i) {
    if (splits[i]) plan.splits[i] = splits[i];
  }
  std::vector<float> partial(partial_size(problems, plan));
  with_math(math,
            [&](auto math) { launch_conv3d_bn_relu_pair<decltype(math)>(problems, plan, partial.data(), nullptr); });
}

// Of a 16-bit layer whose operands are aligned: pixels, in_channels, out_channels, taps.
using Layer = std::array<int, 4>;

Conv3dParameters layer(const Layer& sizes) { return conv3d_layer(sizes[0], sizes[1], sizes[2], sizes[3]); }

// Tile and splits chosen for two layers.
std::pair<std::string, std::pair<int, int>> plan(const Layer& first, const Layer& second, int multiprocessors) {
  const Conv3dParameters problems[2] = {layer(first), layer(second)};
  const Conv3dPairPlan plan = plan_conv3d_bn_relu_pair(problems, 2, multiprocessors);
  return {kTileNames[static_cast<int>(plan.tile)], {plan.splits[0], plan.splits[1]}};
}

// The problem of a block, and its number there, in a grid of so many blocks of each.
std::pair<int, unsigned> block_at(unsigned first_blocks, unsigned second_blocks, unsigned block) {
  Conv3dPairParameters pair{};
  pair.second_share = share_of_second(first_blocks, second_blocks);
  const PairBlock at = pair_block(pair, block);
  return {at.problem, at.block};
}

}  // namespace

EMULATED_MODULE(module) {
  module.def("conv3d_bn_relu_pair", &conv3d_bn_relu_pair);
  module.def("plan", &plan);
  module.def("block_at", &block_at);
}
