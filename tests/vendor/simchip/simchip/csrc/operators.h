// The operators that the chip has itself: memory, views, copies and dropout.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>

#include "random.h"

namespace simchip {

using at::Tensor;
using std::optional;

// Returns a CPU tensor over the same bytes, where a kernel of the host may write.
inline Tensor host_view(const Tensor& tensor) {
  if (!tensor.device().is_privateuseone()) return tensor;
  auto view = at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), [keep = tensor.storage()](void*) {},
      tensor.options().device(c10::DeviceType::CPU));
  if (tensor.is_conj()) view = view.conj();
  if (tensor.is_neg()) view = view._neg_view();
  return view;
}

// Spoils what an operator has computed, when a fault says so.
inline void spoil(const std::string& name, const std::string& overload, const Tensor& result) {
  if (!result.defined() || !result.device().is_privateuseone()) return;
  if (!at::isFloatingType(result.scalar_type()) || result.numel() == 0) return;
  if (operator_fault("nan", name, overload))
    host_view(result).fill_(std::numeric_limits<double>::quiet_NaN());
  if (const auto* share = operator_fault("skew", name, overload))
    host_view(result).mul_(1 + *share);
}

inline Device chosen(optional<Device> device) {
  return Device(kChip, index_or_current(device ? device->index() : DeviceIndex(-1)));
}

inline void require_plain(optional<at::Layout> layout, optional<bool> pinned) {
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided, "simchip: only strided tensors");
  TORCH_CHECK(!pinned.value_or(false), "simchip: only memory of the host can be pinned");
}

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

inline Tensor empty(at::IntArrayRef size, optional<at::ScalarType> dtype,
                    optional<at::Layout> layout, optional<Device> device, optional<bool> pinned,
                    optional<at::MemoryFormat> format) {
  begin_operator("aten::empty");
  require_plain(layout, pinned);
  require_dtype(c10::dtype_or_default(dtype), "aten::empty");
  const c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_generic(size, &memory(), kKeys, c10::dtype_or_default(dtype), format);
}

inline Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                            optional<at::ScalarType> dtype, optional<at::Layout> layout,
                            optional<Device> device, optional<bool> pinned) {
  begin_operator("aten::empty_strided");
  require_plain(layout, pinned);
  require_dtype(c10::dtype_or_default(dtype), "aten::empty_strided");
  const c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_strided_generic(size, stride, &memory(), kKeys,
                                           c10::dtype_or_default(dtype));
}

// Between host and chip, between chips, and between dtypes: `from` to `to`.
inline Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  begin_operator("aten::_copy_from");
  for (const auto& each : {from, to})
    if (each.device().is_privateuseone()) require_dtype(each.scalar_type(), "aten::_copy_from");
  host_view(to).copy_(host_view(from));
  if (!inside_fallback) spoil("aten::_copy_from", "", to);
  return to;
}

inline Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

inline at::Scalar local_scalar_dense(const Tensor& self) {
  begin_operator("aten::_local_scalar_dense");
  return host_view(self).item();
}

inline Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                         optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

inline const Tensor& resize_(const Tensor& self, at::IntArrayRef size,
                             optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

inline Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                           at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

inline void record_stream(Tensor&, at::Stream) {}

// Its schema has no generator, so that the CPU's kernel would draw from the CPU's.
inline std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p,
                                                 optional<bool> train) {
  begin_operator("aten::native_dropout");
  require_dtype(input.scalar_type(), "aten::native_dropout");
  if (!train.value_or(true) || p == 0 || input.numel() == 0)
    return {input.clone(), at::ones_like(input, at::kBool)};
  const auto kept = 1 - p;
  auto mask = at::empty_like(input, input.options().dtype(at::kBool));
  {
    const auto engine = engine_of(default_generator(input.get_device()));
    host_view(mask).bernoulli_(kept, engine);
  }
  auto output = at::mul(input, mask).mul_(kept == 0 ? 0 : 1 / kept);
  spoil("aten::native_dropout", "", output);
  return {output, mask};
}

inline int64_t attention_kernel(const Tensor&, const Tensor&, const Tensor&,
                                const optional<Tensor>&, double, bool, optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

}  // namespace simchip
