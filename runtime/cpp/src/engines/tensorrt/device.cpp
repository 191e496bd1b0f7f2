#include "engines/tensorrt/device.hpp"

#include <cstring>
#include <utility>

#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

constexpr std::size_t kAlignment = 256;

std::size_t sum(std::size_t a, std::size_t b) {
  std::size_t total = 0;
  if (__builtin_add_overflow(a, b, &total)) throw Error("device memory: expected fewer bytes than 2**64, found more");
  return total;
}

}  // namespace

Current::Current(const Device& device) : driver_(device.driver_) {
  DYNEXPORT_CALL(driver_, cuCtxPushCurrent, device.context_);
}

Current::~Current() {
  void* popped = nullptr;
  driver_.cuCtxPopCurrent(&popped);
}

Turn::Turn(Device& device) : held_(device.turn_), current_(device) {}

DeviceMemory::DeviceMemory(std::shared_ptr<Device> device, std::size_t bytes) : device_(std::move(device)) {
  const Driver& driver = device_->driver();
  const std::size_t size = bytes == 0 ? 1 : bytes;
  DYNEXPORT_CALL(driver, cuMemAlloc, &address_, size);
  const int code = driver.cuMemsetD8Async(address_, 0, size, device_->stream());
  if (code == 0) return;
  driver.cuMemFree(address_);
  driver.check("cuMemsetD8Async", code);
}

DeviceMemory::~DeviceMemory() {
  try {
    const Current current(*device_);
    device_->driver().cuMemFree(address_);
  } catch (const Error&) {  // the driver is shutting down, and its memory is gone
  }
}

void* DeviceMemory::data() {
  return reinterpret_cast<void*>(address_);  // NOLINT(performance-no-int-to-ptr): the device's addresses are numbers
}

Mirror::Mirror(const std::shared_ptr<Device>& device, const std::vector<std::size_t>& sizes) : device_(device) {
  for (const std::size_t size : sizes) {
    offsets_.push_back(bytes_);
    bytes_ = sum(bytes_, sum(size, kAlignment - 1) / kAlignment * kAlignment);
  }
  if (bytes_ == 0) bytes_ = kAlignment;
  memory_ = std::make_unique<DeviceMemory>(device_, bytes_);
  DYNEXPORT_CALL(device_->driver(), cuMemAllocHost, &host_, bytes_);
  std::memset(host_, 0, bytes_);
}

Mirror::~Mirror() {
  try {
    const Current current(*device_);
    device_->driver().cuMemFreeHost(host_);
  } catch (const Error&) {  // as above
  }
}

void Mirror::copy_in() const {
  DYNEXPORT_CALL(device_->driver(), cuMemcpyHtoDAsync, memory_->address(), host_, bytes_, device_->stream());
}

void Mirror::copy_out() const {
  DYNEXPORT_CALL(device_->driver(), cuMemcpyDtoHAsync, host_, memory_->address(), bytes_, device_->stream());
}

Replay::~Replay() {
  try {
    const Current current(*device_);
    device_->driver().cuGraphExecDestroy(executable_);
  } catch (const Error&) {  // as above
  }
}

void Replay::launch() const { DYNEXPORT_CALL(device_->driver(), cuGraphLaunch, executable_, device_->stream()); }

Device::Device() : driver_(Driver::get()) {
  constexpr unsigned kNonBlocking = 1;  // independent of work in the default stream
  DYNEXPORT_CALL(driver_, cuDeviceGet, &device_, 0);
  // The context that TensorRT uses too.
  DYNEXPORT_CALL(driver_, cuDevicePrimaryCtxRetain, &context_, device_);
  try {
    const Current current(*this);
    DYNEXPORT_CALL(driver_, cuStreamCreate, &stream_, kNonBlocking);
  } catch (const Error&) {
    driver_.cuDevicePrimaryCtxRelease(device_);
    throw;
  }
}

Device::~Device() {
  try {
    const Current current(*this);
    driver_.cuStreamDestroy(stream_);
  } catch (const Error&) {  // as above
  }
  driver_.cuDevicePrimaryCtxRelease(device_);
}

void Device::copy(DevicePointer to, DevicePointer from, std::size_t bytes) const {
  DYNEXPORT_CALL(driver_, cuMemcpyDtoDAsync, to, from, bytes, stream_);
}

void Device::wait() const { DYNEXPORT_CALL(driver_, cuStreamSynchronize, stream_); }

void Device::settle() const noexcept { driver_.cuStreamSynchronize(stream_); }

std::unique_ptr<Replay> Device::capture(const std::function<void()>& launch) {
  constexpr int kThisThread = 1;  // what other threads do at the same time does not end the capture
  DYNEXPORT_CALL(driver_, cuStreamBeginCapture, stream_, kThisThread);
  bool refused = false;
  try {
    launch();
  } catch (const Error&) {
    refused = true;
  }
  void* graph = nullptr;
  void* executable = nullptr;
  // Also after a failure: only this call ends the capture.
  if (driver_.cuStreamEndCapture(stream_, &graph) != 0 || graph == nullptr) return nullptr;
  const bool made = !refused && driver_.cuGraphInstantiate(&executable, graph, 0) == 0;
  driver_.cuGraphDestroy(graph);
  return made ? std::make_unique<Replay>(shared_from_this(), executable) : nullptr;
}

}  // namespace dynexport::tensorrt
