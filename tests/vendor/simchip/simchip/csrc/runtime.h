// The state of the simulated chips of this process: how many, how large, and what is broken.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>

namespace simchip {

using c10::Device;
using c10::DeviceIndex;
constexpr auto kChip = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 16;
// A stat() takes about a microsecond, an operator of the fallback about five.
constexpr int64_t kOperatorsPerLostFileCheck = 64;

// What is broken. Written by simchip::inject only, before or between the operators it is for.
struct Faults {
  // kind ("fail", "nan", "skew", "missing") -> operator -> argument; "*" is every operator.
  std::map<std::string, std::unordered_map<std::string, double>> operators;
  std::array<bool, static_cast<size_t>(c10::ScalarType::NumOptions)> refused_dtypes{};
  int64_t lost_after = -1;  // operators that still run; -1 without end
  std::string lost_file;
  double slow_microseconds = 0;
  double stats_factor = 1;
  double capacity_factor = 1;
  bool leak = false;
  bool plain_oom = false;
  bool ignore_seed = false;
  bool ignore_rng_state = false;
};

struct Runtime {
  int count = 0;
  size_t capacity_bytes = 0;
  std::mutex mutex;  // of `calls` and of the memory statistics
  std::unordered_map<std::string, int64_t> calls;
  Faults faults;
  std::atomic<int64_t> operators{0};
  std::atomic<bool> lost{false};

  size_t capacity() const { return static_cast<size_t>(capacity_bytes * faults.capacity_factor); }
};

inline Runtime& runtime() {
  // Never destroyed: tensors of static storage are freed after main has returned.
  static auto* instance = new Runtime;
  return *instance;
}

// Each thread, autograd's included, has a device and streams of its own, as CUDA's have.
inline thread_local DeviceIndex current_device = 0;
inline thread_local std::array<c10::StreamId, kMaxDevices> current_streams{};
// The CPU fallback copies tensors for one operator: its copies are no operators of the chip.
inline thread_local bool inside_fallback = false;

inline DeviceIndex index_or_current(DeviceIndex index) { return index < 0 ? current_device : index; }

inline void require_device(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < runtime().count, "simchip: there is no device ", int(index),
              "; ", runtime().count, " are visible");
}

inline void require_not_lost() {
  TORCH_CHECK(!runtime().lost.load(std::memory_order_relaxed), "simchip: device lost");
}

inline void require_dtype(c10::ScalarType dtype, const std::string& name) {
  TORCH_CHECK(!runtime().faults.refused_dtypes[static_cast<size_t>(dtype)], "simchip: ", name,
              " met ", c10::toString(dtype), ", which this chip does not have");
}

// Returns the argument of a fault of this kind on this operator, or null. `overload` is "out" in
// "aten::mm.out"; a fault names an operator with or without it.
inline const double* operator_fault(const char* kind, const std::string& name,
                                    const std::string& overload) {
  const auto& all = runtime().faults.operators;
  if (all.empty()) return nullptr;
  const auto found = all.find(kind);
  if (found == all.end()) return nullptr;
  for (const auto& key : {name, name + "." + overload, std::string("*")}) {
    const auto entry = found->second.find(key);
    if (entry != found->second.end()) return &entry->second;
  }
  return nullptr;
}

inline void count_towards_loss() {
  auto& chip = runtime();
  const auto number = chip.operators.fetch_add(1, std::memory_order_relaxed);
  const auto& faults = chip.faults;
  bool lost = faults.lost_after >= 0 && number >= faults.lost_after;
  if (!faults.lost_file.empty() && number % kOperatorsPerLostFileCheck == 0) {
    struct stat unused;
    lost = lost || ::stat(faults.lost_file.c_str(), &unused) == 0;
  }
  if (lost) chip.lost = true;
}

// Every operator of the chip begins here.
inline void begin_operator(const std::string& name, const std::string& overload = "") {
  if (inside_fallback) return;
  auto& chip = runtime();
  require_not_lost();
  count_towards_loss();
  require_not_lost();
  {
    std::lock_guard<std::mutex> lock(chip.mutex);
    chip.calls[name]++;
  }
  TORCH_CHECK(!operator_fault("fail", name, overload), "simchip: injected failure in ", name);
  // The words that torch has for an operator without a kernel.
  TORCH_CHECK_NOT_IMPLEMENTED(
      !operator_fault("missing", name, overload), "Could not run '", name,
      "' with arguments from the '", c10::DeviceTypeName(kChip, true),
      "' backend. This could be because the operator doesn't exist for this backend.");
  if (chip.faults.slow_microseconds > 0)
    std::this_thread::sleep_for(
        std::chrono::duration<double, std::micro>(chip.faults.slow_microseconds));
}

}  // namespace simchip
