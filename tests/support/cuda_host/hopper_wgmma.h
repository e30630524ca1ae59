// wgmma on the host. It reads shared memory through the bits of its descriptors, when it is waited
// for and not before: a stage that was given back too early has other data by then. Accumulators
// are NaN in the threads that hold them until the wait. Sums are truncated after each 16 tokens.
#pragma once
#include <deque>
#include <limits>
#include <vector>

namespace liar::hopper {
namespace host {

constexpr int kThreads = 128;

struct Operation {
  uint64_t a, b;
  Element element;
  int columns;
  int64_t from = -1;  // the operation whose result this one adds to; -1: the registers
  int issued = 0;
  bool done = false;
  float* d[kThreads] = {};
  std::vector<float> value;  // 64 × columns
};

struct Thread {
  int64_t next = 0, retired = 0;
  std::deque<int64_t> groups;  // where committed groups end
  bool fenced = false;
};

struct Warpgroup {
  int64_t first = 0;  // index of ops[0]
  std::deque<Operation> ops;
  Thread threads[kThreads];
  Operation& op(int64_t index) { return ops[size_t(index - first)]; }
};

inline Warpgroup warpgroups[8];

inline Warpgroup& warpgroup() { return warpgroups[cuda_host::linear_thread() / kThreads]; }
inline int thread_of_group() { return int(cuda_host::linear_thread() % kThreads); }

// the i-th accumulator of a thread as an offset into 64 × columns
inline int fragment(int thread, int i, int columns) {
  const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
  return row * columns + 8 * (i / 4) + 2 * (thread % 4) + i % 2;
}

// element (index, token) of a transposed operand: 64 indices to a chunk, 8 tokens to a pattern
inline float operand(uint64_t descriptor, Element element, int index, int token) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3FFF) * 16; };
  const uint32_t address = field(0) + uint32_t(2 * (index % 64) + token % 8 * kRowBytes) +
                           uint32_t(index / 64) * field(16) + uint32_t(token / 8) * field(32);
  uint16_t bits;
  memcpy(&bits, at(swizzled(address), 2, "wgmma"), 2);
  return element == Element::bf16 ? bf16_value(bits) : f16_value(bits);
}

// toward zero, as the tensor cores round a running sum
inline float truncated(double x) {
  const float nearest = float(x);
  if (!(std::fabs(double(nearest)) > std::fabs(x))) return nearest;
  return std::nextafter(nearest, 0.0f);
}

__attribute__((optimize("O3"))) inline void multiply(const double* a, const double* b, int columns,
                                                     float* value) {
  for (int row = 0; row < 64; ++row) {
    double sum[256];
    for (int c = 0; c < columns; ++c) sum[c] = double(value[row * columns + c]);
    for (int token = 0; token < 16; ++token)
      for (int c = 0; c < columns; ++c) sum[c] += a[token * 64 + row] * b[token * columns + c];
    for (int c = 0; c < columns; ++c) value[row * columns + c] = truncated(sum[c]);
  }
}

inline void compute(Warpgroup& group, Operation& op) {
  for (const uint64_t d : {op.a, op.b}) {
    // reserved bits and the phase of the pattern, which is 0 where operands start with a pattern
    const bool plain = (d >> 62) == 1 && !(d >> 46 & 0xFFFF) && !(d >> 14 & 3) && !(d >> 30 & 3);
    if (!plain || (d & 0x3FFF) * 16 % kSwizzleBytes)
      cuda_host::fail_here("a descriptor that is not emulated", {"wgmma", "", 0});
  }
  std::vector<double> a(16 * 64), b(size_t(16 * op.columns));
  for (int token = 0; token < 16; ++token) {
    for (int i = 0; i < 64; ++i) a[size_t(token * 64 + i)] = operand(op.a, op.element, i, token);
    for (int i = 0; i < op.columns; ++i)
      b[size_t(token * op.columns + i)] = operand(op.b, op.element, i, token);
  }
  if (op.from >= 0) op.value = group.op(op.from).value;
  multiply(a.data(), b.data(), op.columns, op.value.data());
  op.done = true;
}

// a thread's registers get the results of the operations below `end`
inline void retire(Warpgroup& group, int64_t end) {
  const int t = thread_of_group();
  Thread& thread = group.threads[t];
  cuda_host::wait_until({"wgmma wait", "", 0}, [&] {
    for (int64_t i = thread.retired; i < end; ++i)
      if (group.op(i).issued < kThreads) return false;
    return true;
  });
  for (int64_t i = group.first; i < end; ++i)
    if (!group.op(i).done) compute(group, group.op(i));
  for (int64_t i = thread.retired; i < end; ++i) {
    bool last = true;
    for (int64_t later = i + 1; later < thread.next; ++later)
      last &= group.op(later).d[t] != group.op(i).d[t];
    if (!last) continue;
    thread.fenced = false;
    for (int r = 0; r < group.op(i).columns / 2; ++r)
      group.op(i).d[t][r] = group.op(i).value[size_t(fragment(t, r, group.op(i).columns))];
  }
  thread.retired = end;
  const auto needed = [&](int64_t index) {
    for (const Thread& other : group.threads)
      if (other.retired <= index) return true;
    for (const Operation& op : group.ops)
      if (!op.done && op.from == index) return true;
    return false;
  };
  while (!group.ops.empty() && !needed(group.first)) group.ops.pop_front(), ++group.first;
}

inline void forget_wgmmas() {
  for (Warpgroup& group : warpgroups) group = Warpgroup();
}

}  // namespace host

inline void wgmma_fence() { host::warpgroup().threads[host::thread_of_group()].fenced = true; }

inline void wgmma_commit() {
  host::Thread& thread = host::warpgroup().threads[host::thread_of_group()];
  thread.groups.push_back(thread.next);
}

template <int kPending>
inline void wgmma_wait() {
  host::Warpgroup& group = host::warpgroup();
  host::Thread& thread = group.threads[host::thread_of_group()];
  int64_t end = -1;
  for (; thread.groups.size() > size_t(kPending); thread.groups.pop_front())
    end = thread.groups.front();
  if (end <= thread.retired) return;
  // not before every other thread had a turn: who took a stage back too early has time to use it
  cuda_host::device.current->state = cuda_host::State::ready;
  cuda_host::yield();
  host::retire(group, end);
}

template <int kCount>
inline void settle(float (&)[kCount]) {}

template <Element kElement, int kCount>
inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b) {
  constexpr int kColumns = 2 * kCount;
  host::Warpgroup& group = host::warpgroup();
  const int t = host::thread_of_group();
  host::Thread& thread = group.threads[t];
  if (!thread.fenced) cuda_host::fail_here("a wgmma without a fence before it", {"wgmma", "", 0});
  const int64_t index = thread.next++;
  int64_t from = -1;
  for (int64_t i = thread.retired; i < index; ++i)
    if (group.op(i).d[t] == d) from = i;
  if (index == group.first + int64_t(group.ops.size())) {
    group.ops.emplace_back();
    host::Operation& fresh = group.ops.back();
    fresh.a = a, fresh.b = b, fresh.element = kElement, fresh.columns = kColumns;
    fresh.from = from;
    if (from < 0) fresh.value.resize(64 * kColumns);
  }
  host::Operation& op = group.op(index);
  if (op.a != a || op.b != b || op.columns != kColumns || op.from != from)
    cuda_host::fail_here("the threads of a warpgroup do not agree", {"wgmma", "", 0});
  op.d[t] = d;
  ++op.issued;
  if (from >= 0) return;
  for (int i = 0; i < kCount; ++i) {
    op.value[size_t(host::fragment(t, i, kColumns))] = d[i];
    d[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace liar::hopper
