// A client's connection, with bounds on the bytes and the seconds of what it sends and reads.
#pragma once

#include <httplib.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <string>

#include "settings.hpp"

namespace service {

// A socket as cpp-httplib's stream. One thread uses it.
class Connection final : public httplib::Stream {
 public:
  using Clock = std::chrono::steady_clock;

  // Why reading has ended.
  enum class End { kNone, kClosed, kTimeout, kTooLong };

  Connection(int socket, const HttpSettings& settings) : socket_(socket), settings_(settings) {}

  // Waits for the first bytes of a request. Returns whether there are some before the seconds have passed or
  // ``stopping`` is set.
  bool wait_for_request(double seconds, const std::atomic<bool>& stopping);
  // Starts the bounds of a request's headers, and then those of its body.
  void begin_headers();
  void begin_body();
  End end() const { return end_; }
  // Whether a body that the request announced was not read to its end: the connection then ends with this request.
  void set_unread(bool unread) { unread_ = unread; }
  bool unread() const { return unread_; }

  // Whether the client has hung up.
  bool gone() const;
  // Ends the connection. What a client still sends of an unread body is read for a moment, as it may read the answer
  // only then.
  void finish() const;

  bool is_readable() const override { return end_ == End::kNone; }
  bool is_writable() const override { return !broken_; }
  ssize_t read(char* to, std::size_t size) override;
  ssize_t write(const char* from, std::size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override { ip.clear(), port = 0; }
  void get_local_ip_and_port(std::string& ip, int& port) const override { ip.clear(), port = 0; }
  // The library compares it with the largest socket of select(), which is not used here.
  socket_t socket() const override { return 0; }

 private:
  bool fill();
  bool ready(short events, Clock::time_point deadline) const;

  int socket_;
  const HttpSettings& settings_;
  std::array<char, 1U << 14U> buffer_{};
  std::size_t begin_ = 0, filled_ = 0;
  std::size_t left_ = 0;  // bytes that may still be read
  Clock::time_point deadline_{};
  bool in_headers_ = true, unread_ = false;
  End end_ = End::kNone;
  bool broken_ = false;  // nothing more is written
};

}  // namespace service
