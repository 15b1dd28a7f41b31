// What the host functions of several operators check, with one wording: "<op>: <argument> must be <expected>, got
// <actual>".
#pragma once

#include <climits>
#include <string>
#include <vector>

#include "common.h"

namespace slowfast_ext {

using Sizes = std::vector<int64_t>;

inline std::string text_of(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

inline std::string shape_of(const Tensor& tensor) {
  Sizes sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return text_of(sizes);
}

inline void check_shape(const Tensor& tensor, const char* op, const char* name, const Sizes& shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(same, op, ": ", name, " must be ", text_of(shape), ", got ", shape_of(tensor));
}

inline void check_like(const Tensor& tensor, const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), op, ": ", name,
                  " must be on the device of x, cuda:", x.get_device_index());
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x");
}

// Float32 on the device of x.
inline void check_floats(const Tensor& tensor, const char* op, const char* name, const Tensor& x, const Sizes& shape) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() &&
                      tensor.scalar_type() == ScalarType::Float,
                  op, ": ", name, " must be float32 on the device of x");
  check_shape(tensor, op, name, shape);
}

// A float32 vector of `size` on the device of x: bias and the like.
inline void check_vector(const Tensor& tensor, const char* op, const char* name, const Tensor& x, int64_t size) {
  check_floats(tensor, op, name, x, {size});
}

// What is added to a variance before the root.
inline void check_eps(const char* op, double eps) {
  STD_TORCH_CHECK(eps >= 0, op, ": eps must be at least 0, got ", eps);
}

inline void check_dtype(const Tensor& x, const char* op) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
                  ": x must be float32, float16 or bfloat16 on CUDA, got another dtype");
}

// Older GPUs have neither cp.async nor bfloat16 tensor cores.
inline void check_capability(const Tensor& x, const char* op) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index()));
  STD_TORCH_CHECK(major >= 8, op, ": x must be on a GPU of compute capability 8.0 or newer, got ", major, ".", minor);
}

// For kernels that count in 32 bits; 256 below the end, so that rounding up to a tile cannot overflow.
inline int checked_int(const char* op, int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= INT_MAX - 256, op, ": ", name, " must be at most 2^31 - 257, got ", value);
  return static_cast<int>(value);
}

// The distance between neighbouring pixels if the tensor is a channels-last (N, C, T, H, W) tensor or a slice of some
// channels of one, else -1. Strides of dimensions of size 1 mean nothing.
inline int64_t pixel_pitch(const Tensor& tensor) {
  if (tensor.size(1) > 1 && tensor.stride(1) != 1) return -1;
  int64_t pitch = -1, pixels = 1;
  for (const int dimension : {4, 3, 2, 0}) {
    if (tensor.size(dimension) == 1) continue;
    if (pitch < 0) pitch = tensor.stride(dimension) / pixels;
    if (tensor.stride(dimension) != pitch * pixels) return -1;
    pixels *= tensor.size(dimension);
  }
  if (pitch < 0) return tensor.size(1);  // a single pixel
  return pitch >= tensor.size(1) ? pitch : -1;
}

inline Tensor channels_last(const Tensor& tensor) {
  return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast3d);
}

inline int64_t element_size(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float ? 4 : 2; }

}  // namespace slowfast_ext
