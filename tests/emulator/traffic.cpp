// What traffic.h describes. This file itself is compiled without instrumentation, and runs in one system thread.
#include "traffic.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "execution.h"
#include "module.h"

namespace slowfast_ext::emulator {
namespace {

struct Access {
  const void* instruction;  // in the program, or the name of one that the emulator carries out
  const char* file;         // of the latter
  int line;
  uintptr_t address;
  unsigned bytes, meeting, lane, warp;
  unsigned repetition;  // of the instruction in this thread since the meeting
  int space;            // 0: shared memory; else 1 + index of an array
  bool is_write;
};

struct Watched {
  std::string name;
  uintptr_t begin, end;
};

struct Counts {
  uint64_t requests = 0, transactions = 0, ideal = 0, bytes = 0;
};

// Launch, space, is_write, instruction and its site; without an instruction, all of a warp between two barriers.
using Key = std::tuple<int, int, bool, const void*, const char*, int>;

struct State {
  std::vector<Watched> watched;
  std::vector<Access> accesses;
  std::map<Key, Counts> counts;
  int launch = -1;
};

State& state() {
  static State state;
  return state;
}

// The counting uses functions of the standard library of which the linker may keep an instrumented copy.
bool counting = false;

int space_of(uintptr_t begin, unsigned bytes) {
  const Multiprocessor& multiprocessor = *running->multiprocessor;
  const auto shared = reinterpret_cast<uintptr_t>(multiprocessor.shared());
  if (begin >= shared && begin + bytes <= shared + multiprocessor.grid.shared_bytes) return 0;
  const auto& watched = state().watched;
  for (size_t i = watched.size(); i-- > 0;) {
    if (begin >= watched[i].begin && begin + bytes <= watched[i].end) return 1 + int(i);
  }
  return -1;
}

void note(const void* instruction, const char* file, int line, const void* address, unsigned bytes, bool is_write) {
  if (counting || !running) return;
  counting = true;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const int space = space_of(begin, bytes);
  if (space >= 0) {
    const Thread& thread = *running;
    auto& accesses = state().accesses;
    // Fields that are assigned together to a structure aligned as a whole are one store: nvcc makes it that.
    if (!accesses.empty() && is_write && !file) {
      Access& last = accesses.back();
      const auto distance = static_cast<const char*>(instruction) - static_cast<const char*>(last.instruction);
      if (last.is_write && !last.file && last.lane == thread.lane && last.warp == thread.index.x / 32 &&
          last.meeting == thread.meetings && distance > 0 && distance < 100 && last.address + last.bytes == begin &&
          last.bytes == bytes && last.address % (2 * bytes) == 0) {
        last.bytes = 2 * bytes;
        counting = false;
        return;
      }
    }
    accesses.push_back(
        {instruction, file, line, begin, bytes, thread.meetings, thread.lane, thread.index.x / 32, 0, space, is_write});
  }
  counting = false;
}

using Request = std::vector<Access>;  // of one lane or more

size_t count_distinct(std::vector<uintptr_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  return std::unique(numbers.begin(), numbers.end()) - numbers.begin();
}

void count_shared(Counts& counts, const Request& request) {
  const unsigned lanes_at_once = 128 / std::max(4u, request.front().bytes);
  for (unsigned first = 0; first < 32; first += lanes_at_once) {
    std::array<std::vector<uintptr_t>, 32> banks;
    for (const Access& access : request) {
      if (access.lane < first || access.lane >= first + lanes_at_once) continue;
      for (uintptr_t word = access.address / 4; word <= (access.address + access.bytes - 1) / 4; ++word) {
        banks[word % 32].push_back(word);
      }
    }
    size_t most = 0;
    for (auto& words : banks) most = std::max(most, count_distinct(words));
    counts.transactions += most;
    counts.ideal += most > 0;
  }
}

// What the allocator of a GPU returns begins with a sector, so sectors are counted from the array's beginning on.
void count_global(Counts& counts, const Request& request) {
  const uintptr_t origin = state().watched[request.front().space - 1].begin;
  std::vector<uintptr_t> bytes, sectors;
  for (const Access& access : request) {
    for (uintptr_t byte = access.address - origin; byte < access.address - origin + access.bytes; ++byte) {
      bytes.push_back(byte);
      sectors.push_back(byte / 32);
    }
  }
  const size_t used = count_distinct(bytes);
  counts.transactions += count_distinct(sectors);
  counts.ideal += (used + 31) / 32;
  counts.bytes += used;
}

// Calls count(request) for the accesses of each value of `key`, which they are sorted by.
template <typename Key, typename Count>
void group(const std::vector<Access>& accesses, Key key, Count count) {
  Request request;
  for (size_t i = 0; i < accesses.size(); ++i) {
    request.push_back(accesses[i]);
    if (i + 1 < accesses.size() && key(accesses[i]) == key(accesses[i + 1])) continue;
    count(request);
    request.clear();
  }
}

template <typename Key>
void sort(std::vector<Access>& accesses, Key key) {
  std::stable_sort(accesses.begin(), accesses.end(), [&](const Access& a, const Access& b) { return key(a) < key(b); });
}

// Lines of: launch, "shared" or the array, load or store or instruction, place, and the counts.
std::string report() {
  std::ostringstream lines;
  for (const auto& [key, counts] : state().counts) {
    const auto& [launch, space, is_write, instruction, file, line] = key;
    lines << launch << '\t' << (space ? state().watched[space - 1].name : "shared") << '\t';
    if (file) {
      lines << static_cast<const char*>(instruction) << '\t' << Site{file, line};
    } else if (instruction) {
      Dl_info module{};
      dladdr(instruction, &module);
      const auto offset = static_cast<const char*>(instruction) - static_cast<const char*>(module.dli_fbase);
      lines << (is_write ? "store" : "load") << '\t' << offset;
    } else {
      lines << (is_write ? "written" : "read") << "\tbetween barriers";
    }
    lines << '\t' << counts.requests << '\t' << counts.transactions << '\t' << counts.ideal << '\t' << counts.bytes
          << '\n';
  }
  state() = {};
  return lines.str();
}

void watch(const std::string& name, const Array& array) {
  const auto begin = reinterpret_cast<uintptr_t>(array.data());
  state().watched.push_back({name, begin, begin + array.bytes()});
}

}  // namespace

void note_access(const char* instruction, const char* file, int line, const void* address, unsigned bytes) {
  note(instruction, file, line, address, bytes, false);
}

void begin_launch() { ++state().launch; }

void count_requests() {
  counting = true;
  auto& accesses = state().accesses;
  const auto of_lane = [](const Access& a) {
    return std::tuple(a.warp, a.meeting, a.instruction, a.file, a.line, a.space, a.is_write, a.lane);
  };
  sort(accesses, of_lane);  // and each lane's in their order
  for (size_t i = 1; i < accesses.size(); ++i) {
    if (of_lane(accesses[i]) == of_lane(accesses[i - 1])) accesses[i].repetition = accesses[i - 1].repetition + 1;
  }
  const auto of_request = [](const Access& a) {
    return std::tuple(a.warp, a.meeting, a.instruction, a.file, a.line, a.space, a.is_write, a.repetition);
  };
  sort(accesses, of_request);
  group(accesses, of_request, [](const Request& request) {
    const Access& a = request.front();
    Counts& counts = state().counts[{state().launch, a.space, a.is_write, a.instruction, a.file, a.line}];
    ++counts.requests;
    a.space ? count_global(counts, request) : count_shared(counts, request);
  });
  const auto of_array = [](const Access& a) { return std::tuple(a.warp, a.space, a.is_write); };
  sort(accesses, of_array);
  group(accesses, of_array, [](const Request& request) {
    const Access& a = request.front();
    if (a.space == 0) return;
    Counts& counts = state().counts[{state().launch, a.space, a.is_write, nullptr, nullptr, 0}];
    ++counts.requests;
    count_global(counts, request);
  });
  accesses.clear();
  counting = false;
}

void define_traffic(Module& module) {
  module.def("watch", &watch);
  module.def("traffic", &report);
}

}  // namespace slowfast_ext::emulator

// What g++ calls.
using slowfast_ext::emulator::note;

#define EMULATOR_INSTRUMENTED(bytes)                                                                               \
  void __tsan_read##bytes(void* address) { note(__builtin_return_address(0), nullptr, 0, address, bytes, false); } \
  void __tsan_write##bytes(void* address) { note(__builtin_return_address(0), nullptr, 0, address, bytes, true); }

extern "C" {
EMULATOR_INSTRUMENTED(1)
EMULATOR_INSTRUMENTED(2)
EMULATOR_INSTRUMENTED(4)
EMULATOR_INSTRUMENTED(8)
EMULATOR_INSTRUMENTED(16)
void __tsan_read_range(void* address, unsigned long bytes) {
  note(__builtin_return_address(0), nullptr, 0, address, bytes, false);
}
void __tsan_write_range(void* address, unsigned long bytes) {
  note(__builtin_return_address(0), nullptr, 0, address, bytes, true);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
// The emulator's own.
char __tsan_atomic8_load(const volatile char* value, int) { return __atomic_load_n(value, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile int* value, int stored, int) { __atomic_store_n(value, stored, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(volatile int* value, int added, int) {
  return __atomic_fetch_add(value, added, __ATOMIC_SEQ_CST);
}
}
