// simchip: a simulated accelerator on torch's PrivateUse1. One translation unit, because each that
// includes torch's headers takes ten seconds; each header beside this file is one subject.
#include <ATen/autocast_mode.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include "fallback.h"

namespace simchip {

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

const bool registered = [] {
  c10::SetAllocator(kChip, &memory());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", as_strided);
  m.impl("view", at::native::view);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize_);
  m.impl("set_", at::native::set_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("record_stream", record_stream);
  m.impl("native_dropout", native_dropout);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// A copy resolves conjugates and negatives itself; torch would resolve them by a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// torch.autocast: the lists of operators that torch has for CUDA.
#define SIMCHIP_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define SIMCHIP_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define SIMCHIP_FP32_OPT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define SIMCHIP_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(SIMCHIP_LOWER)
  AT_FORALL_FP32(SIMCHIP_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIMCHIP_FP32_OPT)
  AT_FORALL_PROMOTE(SIMCHIP_PROMOTE)
}

// ---- what simchip/driver.py calls -----------------------------------------------------------

void configure(int64_t devices, int64_t memory_bytes) {
  TORCH_CHECK(devices >= 0 && devices <= kMaxDevices, "simchip: at most ", kMaxDevices,
              " devices, not ", devices);
  runtime().count = static_cast<int>(devices);
  runtime().capacity_bytes = static_cast<size_t>(memory_bytes);
}

void refuse_dtype(at::ScalarType dtype) {
  runtime().faults.refused_dtypes[static_cast<size_t>(dtype)] = true;
}

void inject(const std::string& kind, const std::string& target, double value) {
  auto& faults = runtime().faults;
  if (kind == "lost") {
    faults.lost_after = runtime().operators + static_cast<int64_t>(value);
    runtime().lost = runtime().lost || value <= 0;
  } else if (kind == "lost_file") {
    faults.lost_file = target;
  } else if (kind == "slow") {
    faults.slow_microseconds = value;
  } else if (kind == "stats") {
    faults.stats_factor = value;
  } else if (kind == "capacity") {
    faults.capacity_factor = value;
  } else if (kind == "leak") {
    faults.leak = true;
  } else if (kind == "oom") {
    faults.plain_oom = true;
  } else if (kind == "seed") {
    faults.ignore_seed = true;
  } else if (kind == "rng_state") {
    faults.ignore_rng_state = true;
  } else {
    faults.operators[kind][target] = value;
  }
}

void clear_faults() {
  runtime().faults = Faults{};
  runtime().lost = false;
}

c10::Dict<std::string, int64_t> calls() {
  c10::Dict<std::string, int64_t> result;
  std::lock_guard<std::mutex> lock(runtime().mutex);
  for (const auto& [name, count] : runtime().calls) result.insert(name, count);
  return result;
}

TORCH_LIBRARY(simchip, m) {
  m.def("configure(int devices, int memory_bytes) -> ()", configure);
  m.def("refuse_dtype(ScalarType dtype) -> ()", refuse_dtype);
  m.def("inject(str kind, str target, float value) -> ()", inject);
  m.def("clear_faults() -> ()", clear_faults);
  m.def("calls() -> Dict(str, int)", calls);
  m.def("manual_seed(int device, int seed) -> ()", [](int64_t device, int64_t seed) {
    auto generator = default_generator(DeviceIndex(device));
    generator.set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("initial_seed(int device) -> int", [](int64_t device) {
    return static_cast<int64_t>(default_generator(DeviceIndex(device)).current_seed());
  });
  m.def("rng_state(int device) -> Tensor",
        [](int64_t device) { return default_generator(DeviceIndex(device)).get_state(); });
  m.def("set_rng_state(int device, Tensor state) -> ()", [](int64_t device, const Tensor& state) {
    auto generator = default_generator(DeviceIndex(device));
    generator.set_state(state);
  });
}

}  // namespace simchip

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &simchip::attention_kernel)
}
