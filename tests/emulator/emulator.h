// Lets g++ compile the CUDA kernels of csrc/ and run them on a CPU, checked more strictly than a GPU would.
//
// With SLOWFAST_EXT_EMULATOR defined, csrc/device/ptx.h includes this file in place of the CUDA headers and of its own
// inline PTX; launch_kernel() then runs the whole grid before it returns and throws std::runtime_error on any mistake.
//
// Execution. Each CUDA thread is a fiber, and an operating-system thread runs one block at a time; threads change
// places only where they wait. A warp-wide instruction (mma, ldmatrix, shuffle, __syncwarp) collects the operands of
// its lanes, and the last lane to come executes it for all. If nobody can go on, because a thread has left or waits
// elsewhere, the error lists who waits where.
//
// Strictness.
// - Dynamic shared memory is filled with NaN for each block and has exactly the size asked for. (Static __shared__
//   arrays keep what the previous block left.)
// - cp.async fills its destination with NaN when issued, and reads the source and writes the data in the wait that
//   completes it. Reading too early and overwriting too early both show. A copy never waited for is an error.
// - Alignment, and that an address lies in the shared memory of the block, are checked.
// - Only __syncthreads and __syncwarp order memory. ThreadSanitizer knows each CUDA thread, and each lane itself reads
//   the row of ldmatrix that it gives the address of, so a race is reported between the CUDA threads that have it.
// - AddressSanitizer sees overruns of shared memory and of the arrays the host passes in.
//
// Arithmetic. mma adds exact products in float64 and rounds to float32 once; the hardware rounds earlier and
// differently, by less than any tolerance for these types can resolve.
//
// Environment, read at each launch.
//   SLOWFAST_EXT_EMULATOR_THREADS  operating-system threads (default: all cores)
//   SLOWFAST_EXT_EMULATOR_SEED     a number: run threads in a random order, the same for the same number
//   SLOWFAST_EXT_EMULATOR_DRY_RUN  a number: run nothing, note what would be launched
#pragma once

#include "execution.h"
#include "types.h"

#define threadIdx (::slowfast_ext::emulator::this_thread().index)
#define blockIdx (::slowfast_ext::emulator::this_thread().multiprocessor->block)
#define blockDim (::slowfast_ext::emulator::this_thread().multiprocessor->grid.threads)
#define gridDim (::slowfast_ext::emulator::this_thread().multiprocessor->grid.blocks)

// The block's dynamic shared memory as bytes, aligned for 16-byte accesses and 128-byte swizzles.
#define SHARED_MEMORY(name) unsigned char* const name = ::slowfast_ext::emulator::this_thread().multiprocessor->shared()

inline void __syncthreads(slowfast_ext::emulator::Site site = slowfast_ext::emulator::Site::here()) {
  slowfast_ext::emulator::this_thread().multiprocessor->synchronize_block(site);
}

inline void __syncwarp(uint32_t mask = ~0u, slowfast_ext::emulator::Site site = slowfast_ext::emulator::Site::here()) {
  slowfast_ext::emulator::this_thread().multiprocessor->synchronize_warp(mask, site);
}

namespace slowfast_ext::emulator {

EMULATOR_UNOBSERVED inline void count(uint64_t& counter) { ++counter; }

template <typename T>
T shuffle(const char* instruction, uint32_t mask, T value, unsigned source, Site site) {
  struct Operands {
    T value;
    unsigned source;
    T result;
  } operands{value, source, value};
  Thread& self = this_thread();
  Warp& warp = *self.warp;
  self.multiprocessor->meet_warp(instruction, mask, site, &operands, [&] {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask & warp.lanes & 1u << lane)) continue;
      auto& receiver = *static_cast<Operands*>(warp.threads[lane].operands);
      if (!(mask & warp.lanes & 1u << receiver.source)) {
        self.multiprocessor->fail(site, instruction, ": lane ", lane, " reads from lane ", receiver.source,
                                  ", which takes no part");
      }
      receiver.result = static_cast<Operands*>(warp.threads[receiver.source].operands)->value;
    }
  });
  return operands.result;
}

inline unsigned lane() { return this_thread().lane; }

}  // namespace slowfast_ext::emulator

// As in CUDA, a lane whose source would lie outside its segment of `width` lanes keeps its own value.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              slowfast_ext::emulator::Site site = slowfast_ext::emulator::Site::here()) {
  const int lane = slowfast_ext::emulator::lane();
  return slowfast_ext::emulator::shuffle("__shfl_sync", mask, value, (lane & -width) + (source & (width - 1)), site);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 slowfast_ext::emulator::Site site = slowfast_ext::emulator::Site::here()) {
  const int lane = slowfast_ext::emulator::lane(), source = lane - static_cast<int>(delta);
  return slowfast_ext::emulator::shuffle("__shfl_up_sync", mask, value, source < (lane & -width) ? lane : source, site);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   slowfast_ext::emulator::Site site = slowfast_ext::emulator::Site::here()) {
  const int lane = slowfast_ext::emulator::lane(), source = lane + static_cast<int>(delta);
  return slowfast_ext::emulator::shuffle("__shfl_down_sync", mask, value,
                                         source >= (lane & -width) + width ? lane : source, site);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                  slowfast_ext::emulator::Site site = slowfast_ext::emulator::Site::here()) {
  const int lane = slowfast_ext::emulator::lane(), source = lane ^ lanes;
  return slowfast_ext::emulator::shuffle("__shfl_xor_sync", mask, value,
                                         source >= (lane & -width) + width ? lane : source, site);
}

// The host functions that launches need. A launch is complete when launch_kernel() returns, and reports by exception.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace slowfast_ext {
namespace emulator {

// The dynamic shared memory that each kernel may use: 48 KiB unless raised, up to the 227 KiB of compute
// capability 9.0.
inline size_t& shared_memory_limit(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.try_emplace(kernel, 48u << 10).first->second;
}

}  // namespace emulator
}  // namespace slowfast_ext

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value < 0 || value > 227 << 10) {
    throw std::runtime_error("emulator: dynamic shared memory must be at most 232448 bytes, got " +
                             std::to_string(value));
  }
  slowfast_ext::emulator::shared_memory_limit(reinterpret_cast<const void*>(kernel)) = value;
  return cudaSuccess;
}

namespace slowfast_ext {

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return static_cast<float>(value); }
inline float to_float(float16 value) { return static_cast<float>(value); }

template <typename T>
T from_float(float value) {
  return static_cast<T>(value);
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes,
                   cudaStream_t /*stream*/, Arguments... arguments) {
  const size_t limit = emulator::shared_memory_limit(reinterpret_cast<const void*>(kernel));
  if (shared_bytes > limit) {
    throw std::runtime_error("emulator: dynamic shared memory must be at most " + std::to_string(limit) +
                             " bytes (see cudaFuncSetAttribute), got " + std::to_string(shared_bytes));
  }
  if (emulator::setting("SLOWFAST_EXT_EMULATOR_DRY_RUN")) {
    emulator::launches().push_back({reinterpret_cast<const void*>(kernel), threads, shared_bytes});
    return;
  }
  emulator::launch(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
}

namespace emulator {

inline void check_shared(const char* instruction, const void* address, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    this_thread().multiprocessor->fail(site, instruction, ": the shared address must be 16-byte aligned, got ",
                                       address);
  }
  if (!this_thread().multiprocessor->is_shared(address, 16)) {
    this_thread().multiprocessor->fail(site, instruction, ": the address must lie in the block's shared memory, got ",
                                       address);
  }
}

// Word by word, so that the sanitizers see the accesses: they miss short memcpy and memset that become instructions.
EMULATOR_UNNOTED inline void copy_16(void* to, const void* from) {
  typedef uint64_t __attribute__((may_alias)) Word;
  static_cast<Word*>(to)[0] = static_cast<const Word*>(from)[0];
  static_cast<Word*>(to)[1] = static_cast<const Word*>(from)[1];
}

// mma with 8 * kPerRegister deep operands of kPerRegister elements a register; decode(register, i) is the i-th of them.
template <int kPerRegister, typename Decode>
void multiply(const char* instruction, float* d, const uint32_t* a, const uint32_t* b, Site site, Decode decode) {
  constexpr int kDepth = 8 * kPerRegister;
  typedef double Pair __attribute__((vector_size(16), may_alias));  // as wide as every x86-64 has
  struct Operands {
    float* d;
    const uint32_t *a, *b;
  } operands{d, a, b};
  Thread& self = this_thread();
  Warp& warp = *self.warp;
  if (warp.lanes != ~0u) self.multiprocessor->fail(site, instruction, ": needs a full warp");
  self.multiprocessor->meet_warp(instruction, ~0u, site, &operands, [&] {
    alignas(16) double left[16][kDepth], right[kDepth][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& from = *static_cast<const Operands*>(warp.threads[lane].operands);
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < kPerRegister; ++i) {
        const int k = kPerRegister * member + i;
        for (int half = 0; half < 2; ++half) {
          left[group][k + half * kDepth / 2] = decode(from.a[2 * half], i);
          left[group + 8][k + half * kDepth / 2] = decode(from.a[2 * half + 1], i);
          right[k + half * kDepth / 2][group] = decode(from.b[half], i);
        }
      }
      for (int i = 0; i < 4; ++i) sum[group + i / 2 * 8][2 * member + i % 2] = from.d[i];
    }
    for (int row = 0; row < 16; ++row) {
      Pair total[4];
      std::memcpy(total, sum[row], sizeof(total));
      for (int k = 0; k < kDepth; ++k) {
        const Pair* columns = reinterpret_cast<const Pair*>(right[k]);
        for (int i = 0; i < 4; ++i) total[i] += left[row][k] * columns[i];
      }
      std::memcpy(sum[row], total, sizeof(total));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& to = *static_cast<const Operands*>(warp.threads[lane].operands);
      for (int i = 0; i < 4; ++i) {
        to.d[i] = static_cast<float>(sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
      }
    }
    ++self.multiprocessor->statistics.mma;
  });
}

template <typename T>
struct DecodeHalf {
  float operator()(uint32_t word, int i) const {
    return static_cast<float>(bit_cast<T>(static_cast<uint16_t>(word >> 16 * i)));
  }
};

}  // namespace emulator

namespace ptx {

inline void cp_async_16(void* shared, const void* global, bool valid, emulator::Site site = emulator::Site::here()) {
  static const uint64_t zeros[2] = {0, 0}, poison[2] = {~uint64_t(0), ~uint64_t(0)};
  emulator::Thread& self = emulator::this_thread();
  self.multiprocessor->pause();
  emulator::check_shared("cp.async", shared, site);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) {
    self.multiprocessor->fail(site, "cp.async: the global address must be 16-byte aligned, got ", global);
  }
  emulator::note_access("cp.async", site.file, site.line, shared, 16);
  if (valid) emulator::note_access("cp.async", site.file, site.line, global, 16);
  emulator::copy_16(shared, poison);
  self.copies.push_back({shared, valid ? global : zeros, self.groups, site});
  emulator::count(self.multiprocessor->statistics.cp_async);
}

inline void cp_async_commit() { ++emulator::this_thread().groups; }

template <int kPending>
void cp_async_wait() {
  emulator::Thread& self = emulator::this_thread();
  self.multiprocessor->pause();
  for (; self.landed < self.copies.size(); ++self.landed) {
    const auto& copy = self.copies[self.landed];
    if (copy.group + kPending >= self.groups) return;
    emulator::copy_16(copy.destination, copy.source);
  }
  self.copies.clear();
  self.landed = 0;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, emulator::Site site = emulator::Site::here()) {
  struct Operands {
    alignas(8) uint32_t row[4];
    uint32_t* result;
    uintptr_t address;
  } operands{{}, r, reinterpret_cast<uintptr_t>(shared)};
  emulator::Thread& self = emulator::this_thread();
  emulator::Warp& warp = *self.warp;
  if (warp.lanes != ~0u) self.multiprocessor->fail(site, "ldmatrix: needs a full warp");
  self.multiprocessor->pause();
  emulator::check_shared("ldmatrix", shared, site);
  emulator::note_access("ldmatrix", site.file, site.line, shared, 16);
  emulator::copy_16(operands.row, shared);
  self.multiprocessor->meet_warp("ldmatrix", ~0u, site, &operands, [&] {
    const auto of = [&](int lane) -> Operands& { return *static_cast<Operands*>(warp.threads[lane].operands); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) of(lane).result[matrix] = of(matrix * 8 + lane / 4).row[lane % 4];
      uintptr_t rows[8] = {};  // the address that each group of four banks serves
      bool conflict = false;
      for (int lane = matrix * 8; lane < matrix * 8 + 8; ++lane) {
        uintptr_t& row = rows[of(lane).address / 16 % 8];
        conflict |= row && row != of(lane).address;
        row = of(lane).address;
      }
      self.multiprocessor->statistics.bank_conflicts += conflict;
    }
    ++self.multiprocessor->statistics.ldmatrix;
  });
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16,
                         emulator::Site site = emulator::Site::here()) {
  emulator::multiply<2>("mma", d, a, b, site, emulator::DecodeHalf<bfloat16>());
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16,
                         emulator::Site site = emulator::Site::here()) {
  emulator::multiply<2>("mma", d, a, b, site, emulator::DecodeHalf<float16>());
}

// The tensor core ignores the low 13 bits of a float32.
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             emulator::Site site = emulator::Site::here()) {
  emulator::multiply<1>("mma", d, a, b, site,
                        [](uint32_t word, int) { return emulator::bit_cast<float>(word & 0xffffe000u); });
}

// Every NaN that comes out is the canonical one, as on the GPU.
inline uint32_t max_nan(uint32_t a, uint32_t b, float) {
  const float first = emulator::bit_cast<float>(a), second = emulator::bit_cast<float>(b);
  if (first != first || second != second) return 0x7fffffffu;
  return first > second ? a : b;
}

template <typename T>
uint32_t max_nan(uint32_t a, uint32_t b, T) {
  uint32_t larger = 0;
  for (int i = 0; i < 2; ++i) {
    const float first = emulator::DecodeHalf<T>()(a, i), second = emulator::DecodeHalf<T>()(b, i);
    const uint32_t bits = first != first || second != second ? 0x7fffu : (first > second ? a : b) >> 16 * i & 0xffffu;
    larger |= bits << 16 * i;
  }
  return larger;
}

inline float bits_to_float(uint32_t bits) { return emulator::bit_cast<float>(bits); }

template <typename T>
uint32_t pack(float first, float second, T) {
  return T(first).bits | static_cast<uint32_t>(T(second).bits) << 16;
}

template <typename T>
float2 unpack(uint32_t bits, T) {
  const emulator::DecodeHalf<T> decode;
  return make_float2(decode(bits, 0), decode(bits, 1));
}

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = emulator::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits & 0x7fffffffu) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace ptx
}  // namespace slowfast_ext
