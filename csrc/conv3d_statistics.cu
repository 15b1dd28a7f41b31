// Host side of conv3d_statistics: checks, layouts, dispatch. What the operator means is in
// slowfast_ext/ops/conv3d_statistics.py.
#include <cmath>
#include <tuple>

#include "conv3d_host.h"
#include "conv3d_statistics.cuh"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "conv3d_statistics";
constexpr Conv3dNames kNames{};

std::tuple<Tensor, Tensor, Tensor, Tensor> conv3d_statistics(const Tensor& x, const Tensor& weight, Sizes stride,
                                                             Sizes padding, double eps, bool allow_tf32) {
  const Sizes shape = conv3d_output_shape(kName, kNames, x, weight, stride, padding);
  check_capability(x, kName);
  check_dtype(x, kName);
  check_like(weight, kName, kNames.weight, x);
  check_eps(kName, eps);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  MemoryFormat::ChannelsLast3d);
  const auto empty = [&] { return torch::stable::empty({1, shape[1]}, ScalarType::Float, std::nullopt, x.device()); };
  Tensor mean = empty(), variance = empty(), inverse_std = empty();
  if (y.numel() == 0) {
    torch::stable::fill_(inverse_std, 1 / std::sqrt(eps));
    return {y, torch::stable::zero_(mean), torch::stable::zero_(variance), inverse_std};
  }
  const Conv3dOperands operands = conv3d_operands(conv3d_input(x), weight, std::nullopt, std::nullopt);
  const Conv3dParameters p = conv3d_parameters(kName, operands, stride, padding, /*relu=*/false, y);
  const TileShape tile = plan_conv3d_statistics(p, element_size(x), count_multiprocessors(x));
  // Freed after the launch, but only to the allocator of this stream.
  const Tensor moments =
      torch::stable::empty({moments_size(p, tile, element_size(x)), 2}, ScalarType::Float, std::nullopt, x.device());
  const MergeMoments::Results statistics{mean.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>(),
                                         inverse_std.mutable_data_ptr<float>(), static_cast<float>(eps)};
  const cudaStream_t stream = current_stream(x);
  with_math(x, allow_tf32, [&](auto math) {
    launch_conv3d_statistics<decltype(math)>(p, tile, static_cast<float2*>(moments.data_ptr()), statistics, stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mean, variance, inverse_std};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) { m.impl("conv3d_statistics", TORCH_BOX(&conv3d_statistics)); }

}  // namespace slowfast_ext
