// Every other operator: refused where a real chip would refuse it, else computed by the CPU.
#pragma once

#include <ATen/native/CPUFallback.h>

#include <set>

#include "operators.h"

namespace simchip {

struct InsideFallback {
  bool before = std::exchange(inside_fallback, true);
  ~InsideFallback() { inside_fallback = before; }
};

// Operators to which CUDA too lets tensors of the host be passed.
inline bool takes_host_tensors(const std::string& name) {
  static const std::set<std::string> names{"aten::index", "aten::index_put", "aten::index_put_",
                                           "aten::_index_put_impl_", "aten::_pack_padded_sequence"};
  return names.count(name) > 0;
}

// Checks the tensors of one call against each other and against what the chip can do.
struct Placement {
  const std::string& name;
  optional<Device> first;
  bool host = false;

  void meet(const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (!tensor.device().is_privateuseone()) {
      // A number of the host is passed by value.
      host = host || tensor.dim() > 0;
      return;
    }
    require_dtype(tensor.scalar_type(), name);
    if (!first) first = tensor.device();
    TORCH_CHECK(*first == tensor.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *first, " and ", tensor.device(), "! (", name, ")");
  }

  void meet(const c10::IValue& value) {
    if (value.isTensor()) {
      meet(value.toTensor());
    } else if (value.isList()) {
      for (const c10::IValue& each : value.toListRef()) {
        if (!each.isTensor() && !each.isNone()) return;
        if (each.isTensor()) meet(each.toTensor());
      }
    }
  }

  void require_one_device() const {
    TORCH_CHECK(!first || !host || takes_host_tensors(name),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                first.value_or(Device(kChip, 0)), " and cpu! (", name, ")");
  }
};

inline void spoil_results(const c10::OperatorName& op, const torch::jit::Stack& stack,
                          size_t count) {
  if (runtime().faults.operators.empty()) return;
  for (size_t each = stack.size() - count; each < stack.size(); each++) {
    const auto& result = stack[each];
    if (result.isTensor()) spoil(op.name, op.overload_name, result.toTensor());
    if (result.isTensorList())
      for (const Tensor& tensor : result.toTensorVector()) spoil(op.name, op.overload_name, tensor);
  }
}

inline void fallback(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const auto& schema = handle.schema();
  const auto& op = schema.operator_name();
  begin_operator(op.name, op.overload_name);
  const auto& arguments = schema.arguments();
  const auto base = stack->size() - arguments.size();
  Placement placement{op.name, {}};
  for (size_t each = 0; each < arguments.size(); each++) placement.meet((*stack)[base + each]);
  placement.require_one_device();

  const c10::OptionalDeviceGuard guard(placement.first);
  for (size_t each = 0; each < arguments.size(); each++) {
    if (arguments[each].name() != "generator") continue;
    auto& value = (*stack)[base + each];
    const auto given = value.isNone() ? default_generator(-1) : value.toGenerator();
    TORCH_CHECK(given.device().type() == kChip, "Expected a '", c10::DeviceTypeName(kChip, true),
                "' device type for generator but found '", given.device().type(), "'");
    value = engine_of(given);
  }
  {
    const InsideFallback inside;
    at::native::cpu_fallback(handle, stack);
  }
  spoil_results(op, *stack, schema.returns().size());
}

}  // namespace simchip
