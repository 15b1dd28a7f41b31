// Counts what each access to memory costs a GPU. Kernels are compiled with -fsanitize=thread, so that g++ calls
// __tsan_read4() and its kin at each access, but linked to traffic.cpp, which notes the accesses there, instead of to
// ThreadSanitizer. With -O0 the accesses are those of the source: none is split, merged or moved.
//
// The accesses of a warp's lanes by one instruction, the k-th time since the last barrier or warp-wide instruction, are
// a request. In shared memory it takes, for each group of lanes that together ask for 128 bytes (all lanes for 4 bytes
// each, 16 for 8, 8 for 16), as many wavefronts as the most demanded of the 32 banks holds different 4-byte words; one
// is ideal. In global memory it touches sectors of 32 bytes; as few as its bytes fill are ideal.
#pragma once

#include <cstdint>

#include "fiber.h"

namespace slowfast_ext::emulator {

#ifdef EMULATOR_TRAFFIC
#define EMULATOR_UNNOTED EMULATOR_UNOBSERVED  // for accesses that note_access() is told of
// Of the calling CUDA thread, by an instruction that the emulator carries out itself: `bytes` read or written there.
void note_access(const char* instruction, const char* file, int line, const void* address, unsigned bytes);
// All threads of the block are at a barrier, or at the end: what they noted is complete.
void count_requests();
void begin_launch();
#else
#define EMULATOR_UNNOTED
inline void note_access(const char*, const char*, int, const void*, unsigned) {}
inline void count_requests() {}
inline void begin_launch() {}
#endif

}  // namespace slowfast_ext::emulator
