// Device memory is host memory behind an allocator that counts and that runs out.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <cstdlib>
#include <cstring>
#include <unordered_set>

#include "runtime.h"

namespace simchip {

using Stats = c10::CachingDeviceAllocator::DeviceStats;
constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
// Blocks of CUDA's caching allocator are multiples of 512 bytes; so are these.
constexpr size_t kBlockBytes = 512;

struct Block {
  void* address;
  size_t requested;
  size_t rounded;
  DeviceIndex device;
};

inline void* host_memory(size_t bytes) {
  void* address = nullptr;
  TORCH_CHECK(posix_memalign(&address, 64, bytes) == 0, "simchip: the host has no ", bytes,
              " bytes left to simulate with");
  return address;
}

struct Memory final : c10::DeviceAllocator {
  std::array<Stats, kMaxDevices> stats;
  std::map<const void*, Block> blocks;  // by address, for device_of

  c10::DataPtr allocate(size_t bytes) override {
    const auto device = current_device;
    require_device(device);
    if (bytes == 0) return {nullptr, nullptr, &Memory::release, Device(kChip, device)};
    const auto rounded = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    std::lock_guard<std::mutex> lock(runtime().mutex);
    reserve(device, bytes, rounded);
    void* address = nullptr;
    try {
      address = host_memory(rounded);
    } catch (...) {
      count(device, bytes, rounded, false);
      throw;
    }
    blocks[address] = {address, bytes, rounded, device};
    return {address, address, &Memory::release, Device(kChip, device)};
  }

  // The caller holds the mutex.
  void reserve(DeviceIndex device, size_t bytes, size_t rounded) {
    auto& chip = runtime();
    auto& of_device = stats[device];
    const auto used = static_cast<size_t>(of_device.allocated_bytes[kAll].current);
    if (used + rounded > chip.capacity() || rounded < bytes) {
      of_device.num_ooms++;
      const auto what = c10::str(
          "simchip out of memory. Tried to allocate ", bytes, " bytes on device ", int(device),
          ", which has ", chip.capacity(), " bytes, of which ", used, " are allocated.");
      TORCH_CHECK(!chip.faults.plain_oom, what);
      TORCH_CHECK_WITH(OutOfMemoryError, false, what);
    }
    count(device, bytes, rounded, true);
  }

  void count(DeviceIndex device, size_t bytes, size_t rounded, bool taken) {
    auto& of_device = stats[device];
    const auto change = [taken](c10::CachingAllocator::StatArray& stat, size_t amount) {
      taken ? stat[kAll].increase(amount) : stat[kAll].decrease(amount);
    };
    change(of_device.allocated_bytes, rounded);
    change(of_device.reserved_bytes, rounded);
    change(of_device.active_bytes, rounded);
    change(of_device.requested_bytes, bytes);
    change(of_device.allocation, 1);
    change(of_device.segment, 1);
    change(of_device.active, 1);
  }

  static void release(void* address);

  // Returns the device whose memory holds `address`, or -1.
  DeviceIndex device_of(const void* address) {
    std::lock_guard<std::mutex> lock(runtime().mutex);
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return -1;
    const auto& block = std::prev(after)->second;
    const auto* end = static_cast<const char*>(block.address) + block.rounded;
    return address < end ? block.device : DeviceIndex(-1);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Memory::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  // Nothing is cached, and each operator has ended when it returns.
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  template <class Change>
  void for_each_stat(Stats& of_device, Change change) {
    for (auto* array :
         {&of_device.allocation, &of_device.segment, &of_device.active, &of_device.allocated_bytes,
          &of_device.reserved_bytes, &of_device.active_bytes, &of_device.requested_bytes})
      change((*array)[kAll]);
  }

  Stats getDeviceStats(DeviceIndex index) override {
    require_device(index);
    std::lock_guard<std::mutex> lock(runtime().mutex);
    auto copy = stats[index];
    const auto factor = runtime().faults.stats_factor;
    if (factor != 1)
      for_each_stat(copy, [factor](c10::CachingAllocator::Stat& stat) {
        for (auto* value : {&stat.current, &stat.peak, &stat.allocated, &stat.freed})
          *value = static_cast<int64_t>(*value * factor);
      });
    return copy;
  }

  void resetAccumulatedStats(DeviceIndex index) override {
    require_device(index);
    std::lock_guard<std::mutex> lock(runtime().mutex);
    for_each_stat(stats[index], [](auto& stat) { stat.reset_accumulated(); });
    stats[index].num_ooms = 0;
  }

  void resetPeakStats(DeviceIndex index) override {
    require_device(index);
    std::lock_guard<std::mutex> lock(runtime().mutex);
    for_each_stat(stats[index], [](auto& stat) { stat.reset_peak(); });
  }

  // Free and total bytes.
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex index) override {
    require_device(index);
    std::lock_guard<std::mutex> lock(runtime().mutex);
    const auto total = runtime().capacity_bytes;
    const auto used = static_cast<size_t>(stats[index].allocated_bytes[kAll].current);
    return {total > used ? total - used : 0, total};
  }
};

inline Memory& memory() {
  static auto* instance = new Memory;
  return *instance;
}

inline void Memory::release(void* address) {
  if (address == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(runtime().mutex);
    const auto found = memory().blocks.find(address);
    const auto block = found->second;
    memory().blocks.erase(found);
    if (!runtime().faults.leak) memory().count(block.device, block.requested, block.rounded, false);
  }
  std::free(address);
}

// Host memory that copies to the chip could start from without the CPU.
struct PinnedMemory final : c10::Allocator {
  std::mutex mutex;
  std::unordered_map<const void*, size_t> blocks;

  c10::DataPtr allocate(size_t bytes) override;
  bool holds(const void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [begin, bytes] : blocks)
      if (address >= begin && address < static_cast<const char*>(begin) + bytes) return true;
    return false;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

inline PinnedMemory& pinned_memory() {
  static auto* instance = new PinnedMemory;
  return *instance;
}

inline c10::DataPtr PinnedMemory::allocate(size_t bytes) {
  auto* address = host_memory(std::max<size_t>(bytes, 1));
  {
    std::lock_guard<std::mutex> lock(mutex);
    blocks[address] = bytes;
  }
  const auto release = [](void* gone) {
    {
      std::lock_guard<std::mutex> lock(pinned_memory().mutex);
      pinned_memory().blocks.erase(gone);
    }
    std::free(gone);
  };
  return {address, address, release, Device(c10::DeviceType::CPU)};
}

}  // namespace simchip
