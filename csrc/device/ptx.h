// Thin wrappers over what the kernels need from the hardware, and the only inline PTX. With SLOWFAST_EXT_EMULATOR the
// same names come from tests/emulator/emulator.h, so that g++ compiles the kernels for a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef SLOWFAST_EXT_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The block's dynamic shared memory as bytes, aligned for 16-byte accesses and 128-byte swizzles.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace slowfast_ext {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// Spelled out, because torch compiles with the implicit conversions of these types switched off.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(float16 value) { return __half2float(value); }

// Round to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float value) {
  return __float2half_rn(value);
}

// Launch `kernel(arguments...)`; the caller checks cudaGetLastError().
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
}

namespace ptx {

// Start copying 16 bytes from global to shared memory, both 16-byte aligned; zeros if not valid. `global` must be a
// readable address only if valid. Complete after commit and wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Wait until at most `kPending` of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32 bits). Lane l gives the address of row l % 8 of matrix l / 8 and
// receives from matrix j, in r[j], the 32 bits at row l / 4, word l % 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(source)
               : "memory");
}

// d += a * b with a 16x16 (row), b 16x8 (column), d 16x8 in float32. With g = lane / 4 and t = lane % 4:
// a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t + 8..); b[0] = (2t.., g),
// b[1] = (2t + 8.., g); d = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a * b with a 16x8, b 8x8, d 16x8; a and b hold float32 bits, of which the tensor core reads the tf32 part:
// a[0] = (g, t), a[1] = (g + 8, t), a[2] = (g, t + 4), a[3] = (g + 8, t + 4); b[0] = (t, g), b[1] = (t + 4, g).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The larger of each 16-bit pair, or of two float32 values, held in 32 bits; NaN if either is.
__device__ __forceinline__ uint32_t max_nan(uint32_t a, uint32_t b, bfloat16) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;\n" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

__device__ __forceinline__ uint32_t max_nan(uint32_t a, uint32_t b, float16) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;\n" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

__device__ __forceinline__ uint32_t max_nan(uint32_t a, uint32_t b, float) {
  uint32_t larger;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

// Two 16-bit elements in one register, the first in the low half; pack rounds to nearest even.
__device__ __forceinline__ uint32_t pack(float first, float second, bfloat16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

__device__ __forceinline__ uint32_t pack(float first, float second, float16) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

__device__ __forceinline__ float2 unpack(uint32_t bits, bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

__device__ __forceinline__ float2 unpack(uint32_t bits, float16) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// The nearest tf32 value (10 fraction bits), ties away from zero, as float32 bits.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace ptx
}  // namespace slowfast_ext
#endif
