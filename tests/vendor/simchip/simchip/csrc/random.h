// Random numbers, one generator a device, and the hooks through which torch asks for them.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>

#include "device.h"
#include "memory.h"

namespace simchip {

// Holds a CPU generator, because the CPU kernels that compute for the chip insist on one.
struct Generator final : c10::GeneratorImpl {
  at::Generator engine;

  Generator(DeviceIndex index, at::Generator engine)
      : c10::GeneratorImpl(Device(kChip, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        engine(std::move(engine)) {}

  void set_current_seed(uint64_t seed) override {
    engine.set_current_seed(runtime().faults.ignore_seed ? c10::detail::getNonDeterministicRandom()
                                                         : seed);
  }
  uint64_t current_seed() const override { return engine.current_seed(); }
  uint64_t seed() override { return engine.seed(); }
  void set_offset(uint64_t offset) override { engine.set_offset(offset); }
  uint64_t get_offset() const override { return engine.get_offset(); }
  void set_state(const c10::TensorImpl& state) override {
    if (!runtime().faults.ignore_rng_state) engine.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return engine.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  Generator* clone_impl() const override { return new Generator(device_.index(), engine.clone()); }
};

inline at::Generator new_generator(DeviceIndex index) {
  return at::make_generator<Generator>(index_or_current(index), at::detail::createCPUGenerator());
}

inline const at::Generator& default_generator(DeviceIndex index) {
  static const auto* generators = [] {
    auto* all = new std::array<at::Generator, kMaxDevices>;
    for (int each = 0; each < kMaxDevices; each++) (*all)[each] = new_generator(DeviceIndex(each));
    return all;
  }();
  return generators->at(index_or_current(index));
}

// Returns the CPU generator inside one of ours.
inline at::Generator engine_of(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->engine;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return runtime().count > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(runtime().count); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override {
    require_device(index);
    current_device = index;
  }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const auto before = current_device;
    setCurrentDevice(index);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current_device : exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    require_device(index_or_current(index));
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override { return new_generator(index); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  bool isPinnedPtr(const void* address) const override { return pinned_memory().holds(address); }
  Device getDeviceFromPtr(void* address) const override {
    const auto index = memory().device_of(address);
    TORCH_CHECK(index >= 0, "simchip: this address is in the memory of no device");
    return Device(kChip, index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace simchip
