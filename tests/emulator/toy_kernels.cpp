// Small kernels that exercise the emulator: right ones, and wrong ones for each mistake that it reports.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "device/ptx.h"

namespace py = pybind11;
using slowfast_ext::bfloat16;
using slowfast_ext::float16;
using slowfast_ext::from_float;
using slowfast_ext::launch_kernel;
using slowfast_ext::to_float;
namespace ptx = slowfast_ext::ptx;

namespace {

template <typename T>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  ptx::mma_m16n8k16(d, a, b, type);
}

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  ptx::mma_m16n8k8_tf32(d, a, b);
}

enum class Mistake { none, leading_barrier, trailing_barrier, late_wait, predicate, swizzle };

// c = a b^T with a (rows, k), b (64, k), 64 bytes of k a step: four warps with 32x32 of a 64x64 tile each, a double
// buffer of cp.async, chunks of 16 bytes swizzled so that ldmatrix meets no bank twice.
template <typename T>
__global__ void __launch_bounds__(128) matmul_kernel(const T* __restrict__ a, const T* __restrict__ b,
                                                     float* __restrict__ c, int rows, int k, Mistake mistake) {
  constexpr int kTile = 64, kRowBytes = 64, kOperand = kTile * kRowBytes;
  SHARED_MEMORY(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = k * int(sizeof(T)) / kRowBytes;
  const auto offset = [&](int row, int chunk) {
    const int swizzle = mistake == Mistake::swizzle ? 0 : row / 2 % 4;
    return row * kRowBytes + (chunk ^ swizzle) * 16;
  };
  const auto fetch = [&](int step) {
    unsigned char* stage = shared + step % 2 * 2 * kOperand;
    for (int i = threadIdx.x; i < kTile * 4; i += blockDim.x) {
      const int row = i / 4, chunk = i % 4, a_row = blockIdx.x * kTile + row;
      const int column = (step * kRowBytes + chunk * 16) / int(sizeof(T));
      const bool valid = step < steps, a_valid = valid && (a_row < rows || mistake == Mistake::predicate);
      ptx::cp_async_16(stage + offset(row, chunk), a + size_t(a_row) * k + column, a_valid);
      ptx::cp_async_16(stage + kOperand + offset(row, chunk), b + size_t(row) * k + column, valid);
    }
    ptx::cp_async_commit();
  };
  float sum[2][4][4] = {};
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    if (mistake != Mistake::trailing_barrier)
      __syncthreads();  // all have read the stage that the next fetch overwrites
    fetch(step + 1);
    if (mistake == Mistake::late_wait) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    if (mistake != Mistake::leading_barrier) __syncthreads();
    const unsigned char* stage = shared + step % 2 * 2 * kOperand;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[2][4], right[4][2];
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix_x4(left[i], stage + offset(warp / 2 * 32 + i * 16 + lane % 16, half * 2 + lane / 16));
      }
      for (int j = 0; j < 2; ++j) {
        uint32_t pair[4];
        const int row = warp % 2 * 32 + j * 16 + lane % 8 + lane / 16 * 8;
        ptx::ldmatrix_x4(pair, stage + kOperand + offset(row, half * 2 + lane / 8 % 2));
        for (int i = 0; i < 4; ++i) right[2 * j + i / 2][i % 2] = pair[i];
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) multiply(sum[i][j], left[i], right[j], T());
      }
    }
  }
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 2 * 4 * 4; ++i) {
    const int row = blockIdx.x * kTile + warp / 2 * 32 + i / 16 * 16 + lane / 4 + i / 2 % 2 * 8;
    const int column = warp % 2 * 32 + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < rows) c[size_t(row) * kTile + column] = sum[i / 16][i / 4 % 4][i % 4];
  }
}

// The bare instructions of one warp: registers in, registers out.
template <typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t left[4], right[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i], sum[i] = d[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[threadIdx.x * 2 + i];
  multiply(sum, left, right, T());
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sum[i];
}

__global__ void ldmatrix_kernel(const uint4* rows, uint32_t* out) {
  SHARED_MEMORY(shared);
  reinterpret_cast<uint4*>(shared)[threadIdx.x] = __ldg(rows + threadIdx.x);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + 16 * threadIdx.x);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

// Each block adds up its threads' values: over lanes by shuffles, over warps in static shared memory.
__global__ void sum_kernel(const int* values, int* sums) {
  __shared__ int partial[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int value = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  if (warp > 0) return;
  value = lane < int(blockDim.x) / 32 ? partial[lane] : 0;
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  if (lane == 0) sums[blockIdx.x] = value;
}

__global__ void shuffle_kernel(int* out) {  // (4, 32): what each lane receives, in segments of 8
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(~0u, lane, 9, 8);
  out[32 + lane] = __shfl_up_sync(~0u, lane, 3, 8);
  out[64 + lane] = __shfl_down_sync(~0u, lane, 3, 8);
  if (lane >= 16) out[96 + lane] = __shfl_xor_sync(0xffff0000u, lane, 5, 8);
}

// out[i] = values[i - 1] through shared memory.
__global__ void shift_kernel(const float* values, float* out, bool barrier) {
  SHARED_MEMORY(shared);
  float* exchange = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x;
  exchange[i] = values[i];
  if (barrier && blockDim.x > 32) __syncthreads();
  if (barrier && blockDim.x <= 32) __syncwarp();
  out[i] = exchange[i > 0 ? i - 1 : 0];
}

__global__ void barrier_skipped_kernel() {
  if (threadIdx.x == 17) return;
  __syncthreads();
}

__global__ void barriers_apart_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void warp_apart_kernel() {
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (threadIdx.x % 32 != 5) multiply(d, a, b, bfloat16());
  __syncthreads();
}

__global__ void absent_lane_kernel() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

__global__ void copy_kernel(const unsigned char* global, int global_offset, int shared_offset, bool wait) {
  SHARED_MEMORY(shared);
  if (threadIdx.x > 0) return;
  ptx::cp_async_16(shared + shared_offset, global + global_offset, true);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
}

__global__ void misaligned_ldmatrix_kernel() {
  SHARED_MEMORY(shared);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + 8);
}

__global__ void misaligned_vector_kernel(unsigned char* global) { *reinterpret_cast<uint4*>(global + 4) = uint4(); }

__global__ void shared_overrun_kernel(int bytes) {
  SHARED_MEMORY(shared);
  shared[bytes] = 1;
}

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T, typename Word>
Array<float> matmul(const Array<Word>& a, const Array<Word>& b, Mistake mistake) {
  const int rows = int(a.shape(0)), k = int(a.shape(1));
  Array<float> c({rows, 64});
  launch_kernel(matmul_kernel<T>, (rows + 63) / 64, 128, 4 * 64 * 64, nullptr, reinterpret_cast<const T*>(a.data()),
                reinterpret_cast<const T*>(b.data()), c.mutable_data(), rows, k, mistake);
  return c;
}

template <typename T>
Array<float> mma(const Array<uint32_t>& a, const Array<uint32_t>& b, Array<float> d) {
  launch_kernel(mma_kernel<T>, 1, 32, 0, nullptr, a.data(), b.data(), d.mutable_data());
  return d;
}

Array<uint32_t> ldmatrix(const Array<uint32_t>& rows) {
  Array<uint32_t> out({32, 4});
  launch_kernel(ldmatrix_kernel, 1, 32, 32 * 16, nullptr, reinterpret_cast<const uint4*>(rows.data()),
                out.mutable_data());
  return out;
}

Array<int> sum(const Array<int>& values) {
  Array<int> sums(values.shape(0));
  launch_kernel(sum_kernel, unsigned(values.shape(0)), unsigned(values.shape(1)), 0, nullptr, values.data(),
                sums.mutable_data());
  return sums;
}

Array<int> shuffle() {
  Array<int> out({4, 32});
  launch_kernel(shuffle_kernel, 1, 32, 0, nullptr, out.mutable_data());
  return out;
}

Array<float> shift(const Array<float>& values, bool barrier) {
  const unsigned threads = unsigned(values.size());
  Array<float> out(threads);
  launch_kernel(shift_kernel, 1, threads, threads * sizeof(float), nullptr, values.data(), out.mutable_data(), barrier);
  return out;
}

void run(const std::string& name) {
  alignas(16) unsigned char global[48] = {};
  const auto copy = [&](int global_offset, int shared_offset, bool wait) {
    launch_kernel(copy_kernel, 1, 32, 64, nullptr, global, global_offset, shared_offset, wait);
  };
  if (name == "barrier_skipped") return launch_kernel(barrier_skipped_kernel, 3, 64, 0, nullptr);
  if (name == "barriers_apart") return launch_kernel(barriers_apart_kernel, 1, 64, 0, nullptr);
  if (name == "warp_apart") return launch_kernel(warp_apart_kernel, 1, 64, 0, nullptr);
  if (name == "absent_lane") return launch_kernel(absent_lane_kernel, 1, 32, 0, nullptr);
  if (name == "right_copy") return copy(16, 48, true);
  if (name == "misaligned_source") return copy(4, 0, true);
  if (name == "misaligned_destination") return copy(0, 8, true);
  if (name == "destination_outside") return copy(0, 64, true);
  if (name == "copy_without_wait") return copy(0, 0, false);
  if (name == "misaligned_ldmatrix") return launch_kernel(misaligned_ldmatrix_kernel, 1, 32, 1024, nullptr);
  if (name == "misaligned_vector") return launch_kernel(misaligned_vector_kernel, 1, 1, 0, nullptr, global);
  if (name == "shared_overrun") return launch_kernel(shared_overrun_kernel, 1, 1, 100, nullptr, 100);
  if (name == "too_much_shared") return launch_kernel(shared_overrun_kernel, 1, 1, 49153, nullptr, 0);
  if (name == "raised_shared") {
    cudaFuncSetAttribute(shared_overrun_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
    return launch_kernel(shared_overrun_kernel, 1, 1, 65536, nullptr, 65535);
  }
  if (name == "no_blocks") return launch_kernel(barrier_skipped_kernel, 0, 64, 0, nullptr);
  throw py::key_error(name);
}

template <typename T>
float widen(uint16_t bits) {
  return to_float(slowfast_ext::emulator::bit_cast<T>(bits));
}

template <typename T>
uint16_t narrow(float value) {
  return slowfast_ext::emulator::bit_cast<uint16_t>(from_float<T>(value));
}

}  // namespace

PYBIND11_MODULE(kernel, module) {
  py::enum_<Mistake>(module, "Mistake")
      .value("none", Mistake::none)
      .value("leading_barrier", Mistake::leading_barrier)
      .value("trailing_barrier", Mistake::trailing_barrier)
      .value("late_wait", Mistake::late_wait)
      .value("predicate", Mistake::predicate)
      .value("swizzle", Mistake::swizzle);
  module.def("matmul_bfloat16", &matmul<bfloat16, uint16_t>);
  module.def("matmul_float16", &matmul<float16, uint16_t>);
  module.def("matmul_float32", &matmul<float, float>);
  module.def("mma_bfloat16", &mma<bfloat16>);
  module.def("mma_float16", &mma<float16>);
  module.def("mma_float32", &mma<float>);
  module.def("ldmatrix", &ldmatrix);
  module.def("sum", &sum);
  module.def("shuffle", &shuffle);
  module.def("shift", &shift);
  module.def("run", &run);
  module.def("widen_bfloat16", py::vectorize(widen<bfloat16>));
  module.def("widen_float16", py::vectorize(widen<float16>));
  module.def("narrow_bfloat16", py::vectorize(narrow<bfloat16>));
  module.def("narrow_float16", py::vectorize(narrow<float16>));
  module.def("round_to_tf32", py::vectorize(ptx::round_to_tf32));
  module.def("bank_conflicts", [] { return slowfast_ext::emulator::statistics().bank_conflicts; });
  module.def("mma_count", [] { return slowfast_ext::emulator::statistics().mma; });
}
