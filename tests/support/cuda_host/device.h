// one block at a time: its threads are fibers, resumed in a selectable order, with the barriers and
// warp exchanges that make them meet. Everything that would hang or be undefined on a device ends
// the launch with a report instead.
#pragma once
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

enum class Order { forward, reverse, random };
enum class State { ready, polling, at_barrier, at_rendezvous, done };

// where in the source a thread waits
struct Site {
  const char* what = "";
  const char* file = "";
  int line = 0;
};

// what a thread brings to an exchange: the last one to arrive computes every result
struct Rendezvous {
  unsigned first = 0, count = 0;  // linear indices of the threads that may take part
  uint32_t mask = ~0u;            // which of them do, where count is 32
  const void* in = nullptr;
  void* out = nullptr;
  int64_t argument = 0;
};

struct Fiber {
  State state = State::done;
  Context context = nullptr;
  uint3 index{};
  Site site;
  bool progressed = false;
  int barrier = 0;
  Rendezvous meeting;
};

// receives the threads that take part, lane by lane (nullptr for those left out)
using Combine = void (*)(Fiber** members, unsigned count);

struct Device {
  Order order = Order::forward;
  uint64_t random = 1;
  int capability = 90;
  int shared_limit = 232448;  // opt-in maximum of the device
  int processors = 4;
  std::string report;

  std::vector<Fiber> fibers;
  size_t threads = 0, live = 0;
  Fiber* current = nullptr;
  Context scheduler = nullptr;
  std::function<void()> body;
  unsigned arrived[16] = {};
  bool failed = false;
  std::vector<char> shared;  // dynamic shared memory of the block, with guards on both sides
  size_t shared_bytes = 0;
};

inline Device device;

// a power of two, so that a kernel may align its own carve-up by as much
constexpr size_t kAlign = 1024, kGuard = 1024;
constexpr unsigned char kGuardByte = 0xA5;

inline uint64_t next_random() {
  uint64_t& x = device.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

inline void yield() { switch_context(&device.current->context, device.scheduler); }

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  if (device.failed) return;  // the first report is the cause of the others
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  char where[96];
  snprintf(where, sizeof where, " [block (%u,%u,%u)]", blockIdx.x, blockIdx.y, blockIdx.z);
  device.report = std::string(text) + where;
  device.failed = true;
}

// reports, and leaves the kernel from inside a thread: its stack is abandoned, never unwound
[[noreturn]] inline void fail_here(const char* what, const Site& site) {
  const uint3 t = device.current->index;
  fail("%s: thread (%u,%u,%u) in %s at %s:%d", what, t.x, t.y, t.z, site.what, site.file,
       site.line);
  device.current->state = State::done;
  yield();
  abort();
}

inline unsigned linear_thread() { return unsigned(device.current - device.fibers.data()); }

// the random order also interrupts where nothing forces a thread to wait
inline void maybe_interrupt() {
  if (device.order == Order::random && (next_random() & 1)) {
    device.current->state = State::ready;
    yield();
  }
}

// bar.sync id, count (0: every thread of the block)
inline void barrier(int id, unsigned count, Site site) {
  Fiber& self = *device.current;
  const unsigned expected = count ? count : unsigned(device.threads);
  self.site = site;
  self.barrier = id;
  if (++device.arrived[id] < expected) {
    self.state = State::at_barrier;
    return yield();
  }
  device.arrived[id] = 0;
  for (size_t i = 0; i < device.threads; ++i) {
    Fiber& other = device.fibers[i];
    if (other.state != State::at_barrier || other.barrier != id) continue;
    if (!count && (other.site.line != site.line || strcmp(other.site.file, site.file) != 0))
      fail("divergent barrier: some threads wait at %s:%d, others at %s:%d", site.file, site.line,
           other.site.file, other.site.line);
    other.state = State::ready;
  }
  // the last to arrive has no advantage over the others
  self.state = State::ready;
  yield();
}

// bar.arrive id, count
inline void barrier_arrive(int id, unsigned count) {
  if (++device.arrived[id] < count) return;
  device.arrived[id] = 0;
  for (size_t i = 0; i < device.threads; ++i) {
    Fiber& other = device.fibers[i];
    if (other.state == State::at_barrier && other.barrier == id) other.state = State::ready;
  }
}

// waits for a condition that another thread makes true; a block in which nothing else happens any
// more is reported as a deadlock
template <typename Condition>
void wait_until(Site site, Condition condition) {
  Fiber& self = *device.current;
  self.site = site;
  while (!condition()) {
    self.state = State::polling;
    yield();
  }
  self.progressed = true;
}

// an exchange between the threads [first, first + count) that `mask` names (count 32), or all
inline void rendezvous(Rendezvous meeting, Combine combine, Site site) {
  Fiber& self = *device.current;
  self.site = site;
  self.meeting = meeting;
  Fiber* members[128] = {};
  for (unsigned i = 0; i < meeting.count; ++i) {
    if (meeting.count == 32 && !(meeting.mask >> i & 1)) continue;
    const size_t thread = meeting.first + i;
    if (thread >= device.threads) fail_here("the mask names a thread outside the block", site);
    Fiber& other = device.fibers[thread];
    if (other.state == State::done) fail_here("the mask names a thread that has exited", site);
    members[i] = &other;
    if (&other == &self) continue;
    const bool there = other.state == State::at_rendezvous && other.site.line == site.line &&
                       strcmp(other.site.file, site.file) == 0 &&
                       strcmp(other.site.what, site.what) == 0 &&
                       other.meeting.mask == meeting.mask && other.meeting.count == meeting.count;
    if (!there) {
      self.state = State::at_rendezvous;
      return yield();
    }
  }
  if (!members[linear_thread() - meeting.first])
    fail_here("the mask leaves out the thread itself", site);
  if (combine) combine(members, meeting.count);
  for (unsigned i = 0; i < meeting.count; ++i)
    if (members[i]) members[i]->state = State::ready;
  maybe_interrupt();
}

// a warp's exchange of one value of up to 16 bytes
template <typename In, typename Out>
Out exchange(uint32_t mask, const In& in, int64_t argument, Combine combine, Site site) {
  Out out{};
  Rendezvous meeting;
  meeting.first = linear_thread() / 32 * 32;
  meeting.count = 32;
  meeting.mask = mask;
  meeting.in = &in;
  meeting.out = &out;
  meeting.argument = argument;
  rendezvous(meeting, combine, site);
  return out;
}

// --- the scheduler -------------------------------------------------------------------------------

inline void fiber_main() {
  device.body();
  device.current->state = State::done;
  yield();
  abort();
}

inline thread_local volatile char tls_anchor;

// `__shared__` variables are thread_local ones, so they are this module's TLS segment; a fresh block
// must not see what the last one left there
inline void poison_static_shared() {
  tls_anchor = 0;  // the loader allocates the segment at the first access
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        const auto self = reinterpret_cast<uintptr_t>(&poison_static_shared);
        bool mine = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t start = info->dlpi_addr + header.p_vaddr;
          mine |= header.p_type == PT_LOAD && self >= start && self < start + header.p_memsz;
          if (header.p_type == PT_TLS) bytes = header.p_memsz;
        }
        if (mine && bytes && info->dlpi_tls_data) memset(info->dlpi_tls_data, 0xFF, bytes);
        return int(mine);
      },
      nullptr);
}

inline unsigned char* dynamic_shared() {
  auto base = reinterpret_cast<uintptr_t>(device.shared.data()) + kGuard;
  return reinterpret_cast<unsigned char*>((base + kAlign - 1) & ~uintptr_t(kAlign - 1));
}

inline void prepare_shared(size_t bytes) {
  device.shared_bytes = bytes;
  device.shared.assign(bytes + 2 * kGuard + kAlign, char(kGuardByte));
  memset(dynamic_shared(), 0xFF, bytes);
  poison_static_shared();
}

inline void check_guards() {
  const unsigned char* start = dynamic_shared();
  for (size_t i = 0; i < kGuard; ++i)
    if (start[device.shared_bytes + i] != kGuardByte || start[-1 - ptrdiff_t(i)] != kGuardByte)
      return fail("a write outside the %zu bytes of dynamic shared memory", device.shared_bytes);
}

inline void report_deadlock() {
  std::string text = "no thread can go on:";
  int listed = 0;
  size_t exited = 0;
  Site last;
  for (size_t i = 0; i < device.threads; ++i) {
    const Fiber& f = device.fibers[i];
    exited += f.state == State::done;
    const bool news = f.site.line != last.line || strcmp(f.site.what, last.what) != 0;
    if (f.state == State::done || !news || ++listed > 6) continue;
    last = f.site;
    char line[256];
    snprintf(line, sizeof line, " thread (%u,%u,%u) waits in %s at %s:%d;", f.index.x, f.index.y,
             f.index.z, f.site.what, f.site.file, f.site.line);
    text += line;
  }
  fail("%s %zu of %zu threads have exited", text.c_str(), exited, device.threads);
}

// lets one thread run until it waits; true when that changed anything
inline bool resume(Fiber& f) {
  const bool polled = f.state == State::polling;
  f.progressed = false;
  f.state = State::ready;
  device.current = &f;
  threadIdx = f.index;
  switch_context(&device.scheduler, f.context);
  device.live -= f.state == State::done;
  return !polled || f.progressed || f.state == State::done;
}

// one pass over the threads of a warp in the chosen order; true when that changed anything
inline bool run_warp(size_t warp) {
  const size_t first = 32 * warp, count = std::min<size_t>(32, device.threads - first);
  size_t lanes[32];
  for (size_t i = 0; i < count; ++i)
    lanes[i] = first + (device.order == Order::reverse ? count - 1 - i : i);
  if (device.order == Order::random)
    for (size_t i = count; i > 1; --i) std::swap(lanes[i - 1], lanes[next_random() % i]);
  bool progress = false;
  for (size_t i = 0; i < count && !device.failed; ++i) {
    Fiber& f = device.fibers[lanes[i]];
    if (f.state == State::ready || f.state == State::polling) progress |= resume(f);
  }
  return progress;
}

// a warp that is chosen runs until it waits for another one (in random order also less far), so
// that warps drift as far apart as the barriers between them allow
inline void run_block() {
  device.threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  device.fibers.assign(device.threads, Fiber());
  device.live = device.threads;
  std::fill(std::begin(device.arrived), std::end(device.arrived), 0u);
  for (size_t i = 0; i < device.threads; ++i) {
    Fiber& f = device.fibers[i];
    f.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
               unsigned(i / blockDim.x / blockDim.y)};
    f.state = State::ready;
    f.context = prepare_context(fiber_stack(i), fiber_main);
  }
  const size_t warps = (device.threads + 31) / 32;
  std::vector<size_t> pass(warps);
  for (size_t i = 0; i < warps; ++i)
    pass[i] = device.order == Order::reverse ? warps - 1 - i : i;
  while (device.live && !device.failed) {
    if (device.order == Order::random)
      for (size_t i = warps; i > 1; --i) std::swap(pass[i - 1], pass[next_random() % i]);
    bool progress = false;
    for (const size_t warp : pass)
      while (!device.failed && run_warp(warp)) {
        progress = true;
        if (device.order == Order::random && next_random() % 16 == 0) break;
      }
    if (!progress && device.live && !device.failed) report_deadlock();
  }
}

// every block in turn; false when one of them was reported
inline bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  device.failed = false;
  device.report.clear();
  device.body = std::move(body);
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        prepare_shared(shared_bytes);
        run_block();
        if (!device.failed) check_guards();
        if (device.failed) return false;
      }
  return true;
}

}  // namespace cuda_host
