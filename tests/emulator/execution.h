// How blocks, warps and threads run: one fiber per CUDA thread, one block at a time per operating-system thread.
#pragma once

#include <link.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"
#include "traffic.h"
#include "types.h"

namespace slowfast_ext::emulator {

// Counters of the last launch, over all its blocks.
struct Statistics {
  uint64_t mma = 0;             // warp-wide instructions
  uint64_t ldmatrix = 0;        // warp-wide instructions, of four phases (8 rows of 16 bytes) each
  uint64_t bank_conflicts = 0;  // phases of ldmatrix in which two different rows meet in a bank
  uint64_t cp_async = 0;        // copies of 16 bytes
  uint64_t barriers = 0;        // __syncthreads

  void operator+=(const Statistics& other) {
    mma += other.mma, ldmatrix += other.ldmatrix, bank_conflicts += other.bank_conflicts;
    cp_async += other.cp_async, barriers += other.barriers;
  }
};

inline Statistics& statistics() {
  static Statistics last;
  return last;
}

// What the host asked for, where SLOWFAST_EXT_EMULATOR_DRY_RUN is set.
struct Launch {
  const void* kernel;
  unsigned threads;
  size_t shared_bytes;  // dynamic
};

inline std::vector<Launch>& launches() {
  static std::vector<Launch> launches;
  return launches;
}

// Where in the source an instruction stands; as a default argument, where its caller stands.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

inline std::ostream& operator<<(std::ostream& stream, const Site& site) {
  const std::string file = site.file;
  return stream << file.substr(file.rfind('/') + 1) << ":" << site.line;
}

// Some threads have arrived at an instruction that needs others too: the same one, at the same place, with the same
// mask.
struct Meeting {
  const char* instruction;
  Site site;
  uint32_t mask;
  unsigned arrived = 0;

  bool operator==(const Meeting& other) const {
    return instruction == other.instruction && site == other.site && mask == other.mask;
  }
};

struct Warp;
class Multiprocessor;

struct Thread {
  struct Copy {
    void* destination;
    const void* source;
    unsigned group;
    Site site;
  };

  Fiber fiber;
  Multiprocessor* multiprocessor;
  Warp* warp;
  unsigned lane;
  dim3 index;
  // What it waits for, if it waits, and what it brings to it.
  const char* instruction = nullptr;
  Site site{};
  void* operands = nullptr;
  bool finished = false;
  // Its cp.async that have not landed, oldest first from `landed` on, and the number of groups committed.
  std::vector<Copy> copies;
  size_t landed = 0;
  unsigned groups = 0;
  unsigned meetings = 0;            // at which it has been, see traffic.h
  char arrival = 0, departure = 0;  // addresses that stand for the edges of its synchronisations
};

struct Warp {
  Thread* threads;  // 32 of them, fewer in the last warp of a block
  uint32_t lanes;   // those that exist
  std::vector<Meeting> meetings;
};

inline thread_local Thread* running __attribute__((tls_model("initial-exec"))) = nullptr;

EMULATOR_UNOBSERVED inline Thread& this_thread() { return *running; }

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes;
  std::function<void()> kernel;
  std::optional<uint64_t> seed;  // of a random schedule
};

// Runs blocks of one grid, one after the other, on the operating-system thread that constructs it.
class Multiprocessor {
 public:
  dim3 block;
  const Grid& grid;
  Statistics statistics;

  explicit Multiprocessor(const Grid& grid)
      : grid(grid), stacks_(grid.threads.x), threads_(grid.threads.x), warps_((grid.threads.x + 31) / 32) {
    if (posix_memalign(&shared_, 128, grid.shared_bytes)) throw std::bad_alloc();  // exact: sanitizers see overruns
    ready_.reserve(threads_.size());
    for (unsigned i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.multiprocessor = this;
      thread.warp = &warps_[i / 32];
      thread.lane = i % 32;
      thread.index = {i, 0, 0};
      thread.fiber.prepare(stacks_[i], Stacks::kBytes, run_thread);
    }
    for (unsigned i = 0; i < warps_.size(); ++i) {
      const unsigned lanes = std::min<unsigned>(32, threads_.size() - 32 * i);
      warps_[i].threads = &threads_[32 * i];
      warps_[i].lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
    }
  }
  Multiprocessor(const Multiprocessor&) = delete;
  ~Multiprocessor() { free(shared_); }

  unsigned char* shared() const { return static_cast<unsigned char*>(shared_); }

  void run_block(unsigned index) {
    block = {index, 0, 0};
    random_ = grid.seed.value_or(0) * 0x9e3779b97f4a7c15u + index;
    unfinished_ = threads_.size();
    if (grid.shared_bytes) std::memset(shared_, 0xff, grid.shared_bytes);  // NaN in every format
    for (size_t i = threads_.size(); i-- > 0;) {
      threads_[i].finished = false;
      wake(threads_[i]);
    }
    happens_before(&begin_);
    running = next_ready();
    host_.switch_to(running->fiber);
    running = nullptr;
    happens_after(&end_);
    if (error_) std::rethrow_exception(error_);
    if (unfinished_) throw std::runtime_error(deadlock());
    count_requests();
  }

  // Bring `operands` to an instruction that needs every lane of `mask`. The last one to come runs execute() for all.
  template <typename Execute>
  void meet_warp(const char* instruction, uint32_t mask, Site site, void* operands, Execute execute) {
    pause();
    Thread& self = this_thread();
    Warp& warp = *self.warp;
    ++self.meetings;
    if (!(mask >> self.lane & 1)) fail(site, instruction, ": the mask must hold the calling lane ", self.lane);
    self.operands = operands;
    const uint32_t lanes = mask & warp.lanes;
    if (!meet(warp.meetings, {instruction, site, mask}, lanes == ~0u ? 32 : __builtin_popcount(lanes))) return;
    Unobserved scope;
    execute();
    for (unsigned lane = 32; lane-- > 0;) {
      if (lane != self.lane && lanes >> lane & 1) wake(warp.threads[lane]);
    }
  }

  void synchronize_warp(uint32_t mask, Site site) {
    Thread& self = this_thread();
    Warp& warp = *self.warp;
    happens_before(&self.arrival);
    meet_warp("__syncwarp", mask, site, nullptr, [&] {
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask & warp.lanes & 1u << lane) happens_after(&warp.threads[lane].arrival);
      }
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask & warp.lanes & 1u << lane) happens_before(&warp.threads[lane].departure);
      }
    });
    happens_after(&self.departure);
  }

  void synchronize_block(Site site) {
    pause();
    Thread& self = this_thread();
    ++self.meetings;
    happens_before(&self.arrival);
    if (meet(meetings_, {"__syncthreads", site, 0}, threads_.size())) {
      Unobserved scope;
      ++statistics.barriers;
      count_requests();
      for (Thread& thread : threads_) happens_after(&thread.arrival);
      for (Thread& thread : threads_) happens_before(&thread.departure);
      for (size_t i = threads_.size(); i-- > 0;) {
        if (&threads_[i] != &self) wake(threads_[i]);
      }
    }
    happens_after(&self.departure);
  }

  // In a random schedule, perhaps let others go first.
  void pause() {
    if (!grid.seed) return;
    Thread& self = this_thread();
    {
      Unobserved scope;
      if (random() % 4) return;
      wake(self);
    }
    leave(self);
  }

  // Shared memory of this block: the dynamic part, or a static array (some module's variables of this system thread).
  bool is_shared(const void* address, size_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
    const auto dynamic = reinterpret_cast<uintptr_t>(shared_);
    if (begin >= dynamic && end <= dynamic + grid.shared_bytes) return true;
    Unobserved scope;
    if (begin >= static_begin_ && end <= static_end_) return true;
    static_begin_ = begin, static_end_ = end;
    const auto find = [](dl_phdr_info* module, size_t, void* argument) {
      auto& self = *static_cast<Multiprocessor*>(argument);
      const auto data = reinterpret_cast<uintptr_t>(module->dlpi_tls_data);
      for (int i = 0; data && i < module->dlpi_phnum; ++i) {
        const auto& segment = module->dlpi_phdr[i];
        if (segment.p_type != PT_TLS || self.static_begin_ < data || self.static_end_ > data + segment.p_memsz)
          continue;
        self.static_begin_ = data, self.static_end_ = data + segment.p_memsz;
        return 1;
      }
      return 0;
    };
    if (dl_iterate_phdr(find, this)) return true;
    static_begin_ = static_end_ = 0;
    return false;
  }

  template <typename... Parts>
  [[noreturn]] void fail(Site site, const Parts&... parts) {
    std::ostringstream message;
    message << "emulator: block " << block.x << ", thread " << this_thread().index.x << ", " << site << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

 private:
  // Whether the running thread is the last of `expected` at this meeting; if not, it has waited for the last one.
  bool meet(std::vector<Meeting>& meetings, const Meeting& key, unsigned expected) {
    Thread& self = this_thread();
    {
      Unobserved scope;
      size_t i = 0;
      while (i < meetings.size() && !(meetings[i] == key)) ++i;
      if (i == meetings.size()) meetings.push_back(key);
      if (++meetings[i].arrived == expected) {
        meetings[i] = meetings.back();
        meetings.pop_back();
        return true;
      }
      self.instruction = key.instruction;
      self.site = key.site;
    }
    leave(self);
    return false;
  }

  void wake(Thread& thread) { ready_.push_back(&thread); }

  // Without a seed the last one woken, so that a warp runs on until it stands at a barrier: fast (its stacks are in the
  // cache) and severe (warps are as far apart as they can be).
  Thread* next_ready() {
    Unobserved scope;
    if (ready_.empty()) return nullptr;
    if (grid.seed) std::swap(ready_[random() % ready_.size()], ready_.back());
    Thread* thread = ready_.back();
    ready_.pop_back();
    return thread;
  }

  // Go on with a ready thread, perhaps this one, or if there is none in run_block().
  __attribute__((noinline)) EMULATOR_UNOBSERVED void leave(Thread& self) {
    running = next_ready();
    if (running != &self) self.fiber.switch_to(running ? running->fiber : host_);
  }

  uint64_t random() {  // splitmix64
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  [[noreturn]] static void run_thread() {
    Thread& self = this_thread();
    Multiprocessor& multiprocessor = *self.multiprocessor;
    self.fiber.arrived();
    for (;;) {
      happens_after(&multiprocessor.begin_);
      std::exception_ptr error;
      try {
        multiprocessor.grid.kernel();
        if (self.landed < self.copies.size()) {
          multiprocessor.fail(self.copies[self.landed].site, "cp.async: never waited for");
        }
      } catch (...) {
        error = std::current_exception();
      }
      happens_before(&multiprocessor.end_);
      {
        Unobserved scope;
        self.finished = true;
        --multiprocessor.unfinished_;
        multiprocessor.error_ = error;
        if (error) multiprocessor.ready_.clear();
      }
      multiprocessor.leave(self);
    }
  }

  // Who waits where, as thread ranges.
  std::string deadlock() const {
    std::map<std::string, std::string> places;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      const auto place = [this](unsigned thread) {
        std::ostringstream text;
        if (threads_[thread].finished) return std::string("returned");
        text << "wait at " << threads_[thread].instruction << " (" << threads_[thread].site << ")";
        return text.str();
      };
      const std::string here = place(i);
      const unsigned first = i;
      while (i + 1 < threads_.size() && place(i + 1) == here) ++i;
      std::string& list = places[here];
      list += (list.empty() ? "" : ", ") + std::to_string(first) + (i > first ? "-" + std::to_string(i) : "");
    }
    std::string text = "emulator: block " + std::to_string(block.x) + ": deadlock";
    char separator = ':';
    for (const auto& [place, list] : places) {
      text += separator + (" threads " + list + " " + place);
      separator = ';';
    }
    return text;
  }

  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Meeting> meetings_;
  std::vector<Thread*> ready_;
  Fiber host_;
  void* shared_ = nullptr;
  uintptr_t static_begin_ = 0, static_end_ = 0;
  size_t unfinished_ = 0;
  uint64_t random_ = 0;
  std::exception_ptr error_;
  char begin_ = 0, end_ = 0;  // edges from and to run_block(); one for both would order a thread after those that ended
};

// A number from the environment.
inline std::optional<uint64_t> setting(const char* name) {
  const char* text = std::getenv(name);
  if (!text || !*text) return std::nullopt;
  char* end;
  const uint64_t value = std::strtoull(text, &end, 10);
  if (*end) throw std::runtime_error(std::string("emulator: ") + name + " must be a number, got " + text);
  return value;
}

// Run the grid to its end. The first error of a thread ends it and is thrown here.
inline void launch(unsigned blocks, unsigned threads, size_t shared_bytes, std::function<void()> kernel) {
  const auto require = [](bool valid, const char* what, size_t got) {
    if (!valid) throw std::runtime_error(std::string("emulator: ") + what + ", got " + std::to_string(got));
  };
  require(blocks > 0, "the number of blocks must be positive", blocks);
  require(threads > 0 && threads <= 1024, "the threads of a block must be 1 to 1024", threads);
  const Grid grid{{blocks}, {threads}, shared_bytes, std::move(kernel), setting("SLOWFAST_EXT_EMULATOR_SEED")};
  statistics() = {};
  begin_launch();
  std::atomic<unsigned> next{0};
  std::mutex mutex;
  std::exception_ptr first_error;
  const auto work = [&] {
    try {
      Multiprocessor multiprocessor(grid);
      for (unsigned block; (block = next++) < blocks;) multiprocessor.run_block(block);
      const std::lock_guard<std::mutex> lock(mutex);
      statistics() += multiprocessor.statistics;
    } catch (...) {
      next = blocks;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!first_error) first_error = std::current_exception();
    }
  };
  const uint64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t workers = std::min<uint64_t>(blocks, setting("SLOWFAST_EXT_EMULATOR_THREADS").value_or(cores));
  std::vector<std::thread> pool;
  for (uint64_t i = 1; i < workers; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  if (first_error) std::rethrow_exception(first_error);
}

}  // namespace slowfast_ext::emulator
