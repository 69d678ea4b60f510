// How torch chooses a device, and its streams and events. Work is done when it is enqueued.
#pragma once

#include <c10/core/DeviceCapability.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "runtime.h"

namespace simchip {

using Clock = std::chrono::steady_clock;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kChip; }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(kChip, current_device); }
  void setDevice(Device device) const override {
    const auto index = index_or_current(device.index());
    require_device(index);
    current_device = index;
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    current_device = index_or_current(device.index());
  }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(runtime().count); }
  c10::DeviceCapability getDeviceCapability(Device) const override {
    c10::DeviceCapability capability;
    const auto& refused = runtime().faults.refused_dtypes;
    if (refused[size_t(c10::ScalarType::BFloat16)])
      capability.capability_data.supported_scalar_types.has_BFloat16 = 0;
    if (refused[size_t(c10::ScalarType::Half)])
      capability.capability_data.supported_scalar_types.has_Half = 0;
    return capability;
  }

  c10::Stream getStream(Device device) const override {
    const auto index = index_or_current(device.index());
    return c10::Stream(c10::Stream::UNSAFE, Device(kChip, index), current_streams[index]);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(kChip, index_or_current(device.index())));
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(Device device, int) const override {
    static std::atomic<c10::StreamId> next{1};
    const auto index = index_or_current(device.index());
    return c10::Stream(c10::Stream::UNSAFE, Device(kChip, index), next++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_streams[index_or_current(stream.device_index())] = stream.id();
    return before;
  }
  // `override` is left out: torch 2.10 has no such function.
  void* getStreamNativeHandle(const c10::Stream stream) const {
    return reinterpret_cast<void*>(stream.id());
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { require_not_lost(); }
  void synchronizeDevice(const DeviceIndex) const override { require_not_lost(); }

  void record(void** event, const c10::Stream&, const DeviceIndex,
              const c10::EventFlag) const override {
    require_not_lost();
    if (*event == nullptr) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { require_not_lost(); }
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    const auto passed =
        *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(begin);
    return std::chrono::duration<double, std::milli>(passed).count();
  }
};

}  // namespace simchip
