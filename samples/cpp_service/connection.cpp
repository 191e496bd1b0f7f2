#include "connection.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace service {
namespace {

// Largest request line and headers together.
constexpr std::size_t kMostHeaders = 64U << 10U;
constexpr double kLinger = 1.0;  // seconds
constexpr int kSlice = 100;      // milliseconds between two looks at whether the server stops

Connection::Clock::time_point in_seconds(double seconds) {
  return Connection::Clock::now() +
         std::chrono::duration_cast<Connection::Clock::duration>(std::chrono::duration<double>(seconds));
}

int milliseconds_until(Connection::Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Connection::Clock::now()).count();
  return static_cast<int>(std::clamp<long long>(left, 0, 1 << 30));
}

// Waits for events of a socket. Returns those that came; 0 if the time has passed.
short wait_for(int socket, short events, int milliseconds) {
  pollfd one{socket, events, 0};
  const int found = ::poll(&one, 1, milliseconds);
  return found > 0 ? one.revents : static_cast<short>(0);
}

}  // namespace

bool Connection::wait_for_request(double seconds, const std::atomic<bool>& stopping) {
  const Clock::time_point deadline = in_seconds(seconds);
  while (begin_ == filled_) {
    const int left = milliseconds_until(deadline);
    if (left == 0 || stopping) return false;
    if (wait_for(socket_, POLLIN, std::min(left, kSlice)) != 0) return true;
  }
  return true;
}

void Connection::begin_headers() {
  in_headers_ = true;
  unread_ = false;
  left_ = kMostHeaders;
  deadline_ = in_seconds(settings_.header_seconds);
}

void Connection::begin_body() {
  in_headers_ = false;
  left_ = settings_.most_bytes * HttpSettings::kReadFurther;
  deadline_ = in_seconds(settings_.read_seconds);
}

bool Connection::gone() const {
  return broken_ || (wait_for(socket_, POLLRDHUP, 0) & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

bool Connection::ready(short events, Clock::time_point deadline) const {
  while (true) {
    if (wait_for(socket_, events, milliseconds_until(deadline)) != 0) return true;
    if (Clock::now() >= deadline) return false;
  }
}

bool Connection::fill() {
  if (end_ != End::kNone) return false;
  if (!ready(POLLIN, deadline_)) {
    end_ = End::kTimeout;
    broken_ = in_headers_;  // a client that has not asked gets no answer
    return false;
  }
  const ssize_t found = ::recv(socket_, buffer_.data(), buffer_.size(), MSG_DONTWAIT);
  if (found < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (found <= 0) {
    end_ = End::kClosed;
    return false;
  }
  begin_ = 0;
  filled_ = static_cast<std::size_t>(found);
  return true;
}

ssize_t Connection::read(char* to, std::size_t size) {
  if (left_ == 0) end_ = End::kTooLong;
  if (end_ != End::kNone) return -1;
  while (begin_ == filled_) {
    if (!fill()) return end_ == End::kClosed ? 0 : -1;
  }
  const std::size_t count = std::min({size, filled_ - begin_, left_});
  std::memcpy(to, buffer_.data() + begin_, count);
  begin_ += count;
  left_ -= count;
  return static_cast<ssize_t>(count);
}

ssize_t Connection::write(const char* from, std::size_t size) {
  const Clock::time_point deadline = in_seconds(settings_.stall_seconds);
  std::size_t sent = 0;
  while (sent < size && !broken_) {
    const ssize_t count = ::send(socket_, from + sent, size - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count > 0) {
      sent += static_cast<std::size_t>(count);
    } else if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
      broken_ = !ready(POLLOUT, deadline);
    } else {
      broken_ = true;
    }
  }
  return broken_ ? -1 : static_cast<ssize_t>(sent);
}

void Connection::finish() const {
  if (broken_) return;
  ::shutdown(socket_, SHUT_WR);
  if (!unread_ && end_ != End::kTooLong) return;
  std::array<char, 1U << 14U> ignored{};
  const Clock::time_point deadline = in_seconds(kLinger);
  while (ready(POLLIN, deadline) && ::recv(socket_, ignored.data(), ignored.size(), MSG_DONTWAIT) > 0) {
  }
}

}  // namespace service
