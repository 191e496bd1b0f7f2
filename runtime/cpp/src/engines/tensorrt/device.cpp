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

Current::Current(const Device& device) : driver_(device.driver_) { driver_.cuCtxPushCurrent(device.context_); }

Current::~Current() {
  void* popped = nullptr;
  driver_.cuCtxPopCurrent.code(&popped);
}

Turn::Turn(Device& device) : held_(device.turn_), current_(device) {}

DeviceMemory::DeviceMemory(std::shared_ptr<Device> device, std::size_t bytes) : device_(std::move(device)) {
  const Driver& driver = device_->driver();
  const std::size_t size = bytes == 0 ? 1 : bytes;
  driver.cuMemAlloc(&address_, size);
  try {
    driver.cuMemsetD8Async(address_, 0, size, device_->stream());
  } catch (const Error&) {
    driver.cuMemFree.code(address_);
    throw;
  }
}

DeviceMemory::~DeviceMemory() {
  try {
    const Current current(*device_);
    device_->driver().cuMemFree.code(address_);
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
  device_->driver().cuMemAllocHost(&host_, bytes_);
  std::memset(host_, 0, bytes_);
}

Mirror::~Mirror() {
  try {
    const Current current(*device_);
    device_->driver().cuMemFreeHost.code(host_);
  } catch (const Error&) {  // as above
  }
}

void Mirror::copy_in() const {
  device_->driver().cuMemcpyHtoDAsync(memory_->address(), host_, bytes_, device_->stream());
}

void Mirror::copy_out() const {
  device_->driver().cuMemcpyDtoHAsync(host_, memory_->address(), bytes_, device_->stream());
}

Replay::~Replay() {
  try {
    const Current current(*device_);
    device_->driver().cuGraphExecDestroy.code(executable_);
  } catch (const Error&) {  // as above
  }
}

void Replay::launch() const { device_->driver().cuGraphLaunch(executable_, device_->stream()); }

Device::Device() : driver_(Driver::get()) {
  constexpr unsigned kNonBlocking = 1;  // independent of work in the default stream
  driver_.cuDeviceGet(&device_, 0);
  // The context that TensorRT uses too.
  driver_.cuDevicePrimaryCtxRetain(&context_, device_);
  try {
    const Current current(*this);
    driver_.cuStreamCreate(&stream_, kNonBlocking);
  } catch (const Error&) {
    driver_.cuDevicePrimaryCtxRelease.code(device_);
    throw;
  }
}

Device::~Device() {
  try {
    const Current current(*this);
    driver_.cuStreamDestroy.code(stream_);
  } catch (const Error&) {  // as above
  }
  driver_.cuDevicePrimaryCtxRelease.code(device_);
}

void Device::copy(DevicePointer to, DevicePointer from, std::size_t bytes) const {
  driver_.cuMemcpyDtoDAsync(to, from, bytes, stream_);
}

void Device::wait() const { driver_.cuStreamSynchronize(stream_); }

void Device::settle() const noexcept { driver_.cuStreamSynchronize.code(stream_); }

std::unique_ptr<Replay> Device::capture(const std::function<void()>& launch) {
  constexpr int kThisThread = 1;  // what other threads do at the same time does not end the capture
  driver_.cuStreamBeginCapture(stream_, kThisThread);
  bool refused = false;
  try {
    launch();
  } catch (const Error&) {
    refused = true;
  }
  void* graph = nullptr;
  void* executable = nullptr;
  // Also after a failure: only this call ends the capture.
  if (driver_.cuStreamEndCapture.code(stream_, &graph) != 0 || graph == nullptr) return nullptr;
  const bool made = !refused && driver_.cuGraphInstantiate.code(&executable, graph, 0) == 0;
  driver_.cuGraphDestroy.code(graph);
  return made ? std::make_unique<Replay>(shared_from_this(), executable) : nullptr;
}

}  // namespace dynexport::tensorrt
