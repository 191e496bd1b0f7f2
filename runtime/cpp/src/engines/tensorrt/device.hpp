// The part of CUDA that decoding needs: device memory, one stream, CUDA graphs.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "dynexport/engine.hpp"
#include "engines/tensorrt/driver.hpp"

namespace dynexport::tensorrt {

class Device;

// Makes the device's context current in this thread.
class Current {
 public:
  explicit Current(const Device& device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
};

// A thread's turn to use the stream, with the device's context current. Everything in the stream is waited for before
// a turn ends, unless it fails.
class Turn {
 public:
  explicit Turn(Device& device);

 private:
  std::lock_guard<std::mutex> held_;
  Current current_;
};

// Zeroed device memory, aligned to 256 bytes.
class DeviceMemory : public Memory {
 public:
  // The caller has a turn. Throws Error when there is not enough memory.
  DeviceMemory(std::shared_ptr<Device> device, std::size_t bytes);
  ~DeviceMemory() override;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() override;
  DevicePointer address() const { return address_; }

 private:
  std::shared_ptr<Device> device_;
  DevicePointer address_ = 0;
};

// Zeroed arrays with the same offsets in host and device memory, so that one copy moves all of them.
class Mirror {
 public:
  // Offsets of arrays of these sizes, each a multiple of 256; the caller has a turn.
  Mirror(const std::shared_ptr<Device>& device, const std::vector<std::size_t>& sizes);
  ~Mirror();
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  void* host(std::size_t index) const { return static_cast<char*>(host_) + offsets_[index]; }
  DevicePointer device(std::size_t index) const { return memory_->address() + offsets_[index]; }
  // In the stream.
  void copy_in() const;
  void copy_out() const;

 private:
  std::shared_ptr<Device> device_;
  std::vector<std::size_t> offsets_;
  std::size_t bytes_ = 0;
  std::unique_ptr<DeviceMemory> memory_;
  void* host_ = nullptr;
};

// A captured CUDA graph.
class Replay {
 public:
  Replay(std::shared_ptr<Device> device, void* executable) : device_(std::move(device)), executable_(executable) {}
  ~Replay();
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  void launch() const;

 private:
  std::shared_ptr<Device> device_;
  void* executable_;
};

// The first GPU, with a stream of its own.
class Device : public std::enable_shared_from_this<Device> {
 public:
  Device();
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Driver& driver() const { return driver_; }
  void* stream() const { return stream_; }

  // In the stream; the caller has a turn.
  void copy(DevicePointer to, DevicePointer from, std::size_t bytes) const;
  void wait() const;
  // Waits whatever happens: after a failure, before memory of the stream is freed.
  void settle() const noexcept;
  // Captures the work that ``launch`` enqueues; null if it cannot be captured.
  std::unique_ptr<Replay> capture(const std::function<void()>& launch);

 private:
  friend class Current;
  friend class Turn;
  const Driver& driver_;
  int device_ = 0;
  void* context_ = nullptr;
  void* stream_ = nullptr;
  std::mutex turn_;
};

}  // namespace dynexport::tensorrt
