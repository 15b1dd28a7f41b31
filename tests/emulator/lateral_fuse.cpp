// csrc/lateral_fuse.cuh for NumPy: tensors come as arrays in (N, C, T, H, W) order with channels side by side, 16-bit
// types as their bits. With ONLY_BFLOAT16 the other types are left out, for builds that are made once and thrown away.
#include "lateral_fuse.cuh"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;
using namespace slowfast_ext;

namespace {

int64_t pitch(const py::array& array) { return array.strides(4) / array.itemsize(); }

// y is the lateral part; slow and slow_y are None where slow is not copied.
void lateral_fuse(const std::string& math, const py::object& slow, const py::array& fast, const py::array& weight,
                  const py::object& bias, py::object slow_y, py::array y, int stride, bool relu, int multiprocessors,
                  int shared_limit) {
  LateralParameters p{};
  p.fast = fast.data();
  p.weight = weight.data();
  p.bias = bias.is_none() ? nullptr : static_cast<const float*>(py::array(bias).data());
  p.y = y.mutable_data();
  p.fast_pitch = pitch(fast);
  p.y_pitch = pitch(y);
  if (!slow.is_none()) {
    const py::array array(slow);
    p.slow = array.data();
    p.slow_y = py::array(slow_y).mutable_data();
    p.slow_pitch = pitch(array);
    p.slow_channels = array.shape(1);
  }
  p.batch = fast.shape(0);
  p.area = fast.shape(3) * fast.shape(4);
  p.in_frames = fast.shape(2);
  p.out_frames = y.shape(2);
  p.in_channels = fast.shape(1);
  p.out_channels = y.shape(1);
  p.taps = weight.shape(2);
  p.stride = stride;
  p.padding = p.taps / 2;
  p.relu = relu;
  if (math == "bfloat16") return launch_lateral_fuse<HalfMath<bfloat16>>(p, multiprocessors, shared_limit, nullptr);
#ifndef ONLY_BFLOAT16
  if (math == "float16") return launch_lateral_fuse<HalfMath<float16>>(p, multiprocessors, shared_limit, nullptr);
  if (math == "tf32") return launch_lateral_fuse<Tf32Math>(p, multiprocessors, shared_limit, nullptr);
  if (math == "float32") return launch_lateral_fuse<SplitTf32Math>(p, multiprocessors, shared_limit, nullptr);
#endif
  throw std::invalid_argument("not built for " + math);
}

// Of the last launch: ldmatrix instructions, and those of their 8x8 matrices that met a bank twice.
std::pair<uint64_t, uint64_t> statistics() {
  return {emulator::statistics().ldmatrix, emulator::statistics().bank_conflicts};
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, module) {
  module.def("lateral_fuse", &lateral_fuse);
  module.def("statistics", &statistics);
}
