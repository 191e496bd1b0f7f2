#include "server.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "api_error.hpp"
#include "dynexport/error.hpp"

namespace service {
namespace {

// Bytes of an answer that the system holds for a client that does not read.
constexpr int kSendBuffer = 256 << 10;
constexpr int kBacklog = 1024;
constexpr std::size_t kLongestLength = 18;  // digits
constexpr double kKeepAlive = 5.0;          // seconds for a client to ask again
// Connections beside those with a request that the server takes: those that ask for health, or wait.
constexpr std::size_t kMoreConnections = 256;

std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g", value);
  return text.data();
}

// Whether a request has a body, by its headers.
bool announces_body(const httplib::Request& request) {
  return request.has_header("Transfer-Encoding") ||
         (request.has_header("Content-Length") && request.get_header_value("Content-Length") != "0");
}

std::string problem_of(int status) {
  switch (status) {
    case 414:
      return "path: expected at most 8192 bytes, found more";
    case 416:
      return "Range: expected none";
    default:
      return "request: expected HTTP/1.1 with headers of at most 65536 bytes, found something else";
  }
}

ApiError too_large(const HttpSettings& settings) {
  return ApiError(413, "body: expected at most " + std::to_string(settings.most_bytes) + " bytes, found more")
      .code("request_too_large");
}

void answer(httplib::Response& response, const ApiError& error) {
  response.status = error.status();
  response.set_content(written(error.body()), "application/json");
}

void set_option(int socket, int level, int name, int value) {
  ::setsockopt(socket, level, name, &value, sizeof(value));
}

}  // namespace

// What is known of the request that a thread handles.
struct Server::Current {
  explicit Current(Connection& its_connection) : connection(its_connection) {}

  Connection& connection;
  bool parsed = false;  // its headers were read
  std::string path;
  Guard guard;
};

thread_local Server::Current* Server::current_ = nullptr;

// Refuses a body whose end is not clear, and one that is much too large before it is read.
void Exchange::check_length(const HttpSettings& settings) const {
  const std::string length = request_.get_header_value("Content-Length");
  const bool chunked = request_.has_header("Transfer-Encoding");
  const bool digits = std::all_of(length.begin(), length.end(), [](char c) { return c >= '0' && c <= '9'; });
  const bool twice = request_.get_header_value_count("Content-Length") > 1;
  if (chunked ? request_.has_header("Content-Length") || request_.get_header_value("Transfer-Encoding") != "chunked"
              : !digits || twice || length.size() > kLongestLength) {
    throw ApiError(400, "Content-Length: expected one, or Transfer-Encoding: chunked").code("invalid_request");
  }
  if (!chunked && std::stoull("0" + length) > settings.most_bytes * HttpSettings::kReadFurther) {
    throw too_large(settings);
  }
}

std::string Exchange::body(const HttpSettings& settings) {
  std::string body;
  if (reader_ == nullptr || !announces_body(request_)) return body;
  check_length(settings);
  std::size_t size = 0;
  const bool whole = (*reader_)([&](const char* data, std::size_t length) {
    size += length;
    if (size <= settings.most_bytes) body.append(data, length);
    return true;
  });
  response_.status = -1;  // the library's own, of a body that it could not read
  if (!whole && connection_.end() == Connection::End::kTimeout) {
    throw ApiError(408, "body: expected all of it within " + number(settings.read_seconds) + " s")
        .kind("timeout_error")
        .code("request_timeout");
  }
  if (size > settings.most_bytes || connection_.end() == Connection::End::kTooLong) throw too_large(settings);
  if (!whole) throw ApiError(400, "body: expected JSON, found something else").code("invalid_json");
  connection_.set_unread(false);
  return body;
}

Server::Server(const HttpSettings& settings, Answering answering) : settings_(settings), answer_(std::move(answering)) {
  set_handlers();
}

Server::~Server() {
  stop_listening();
  end_connections(0);
}

int Server::bind(const std::string& host, int& port) {
  const auto refuse = [&](const std::string& found) {
    return dynexport::Error("--host " + host + " --port " + std::to_string(port) +
                            ": expected a free address, found: " + found);
  };
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int failed = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (failed != 0) throw refuse(::gai_strerror(failed));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, &::freeaddrinfo);
  const int bound = ::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (bound < 0) throw refuse(std::strerror(errno));
  set_option(bound, SOL_SOCKET, SO_REUSEADDR, 1);
  set_option(bound, SOL_SOCKET, SO_SNDBUF, kSendBuffer);
  if (::bind(bound, found->ai_addr, found->ai_addrlen) != 0 || ::listen(bound, kBacklog) != 0) {
    const std::string reason = std::strerror(errno);
    ::close(bound);
    throw refuse(reason);
  }
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  std::array<char, NI_MAXSERV> service{};
  ::getsockname(bound, reinterpret_cast<sockaddr*>(&address), &length);
  ::getnameinfo(reinterpret_cast<sockaddr*>(&address), length, nullptr, 0, service.data(), service.size(),
                NI_NUMERICSERV);
  port = std::atoi(service.data());
  return bound;
}

void Server::run(int listening) {
  listening_ = listening;
  // The library ends streams when its own socket is none: it has one until the last stream has ended.
  svr_sock_ = listening;
  while (!stopping_) {
    const int socket = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
    if (socket < 0) {
      if (stopping_) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));  // such as too many open files
      continue;
    }
    set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1);
    std::unique_lock lock(mutex_);
    if (connections_.size() >= settings_.requests + kMoreConnections) {
      lock.unlock();
      ::close(socket);
      continue;
    }
    connections_.insert(socket);
    try {
      std::thread([this, socket] { serve(socket); }).detach();
    } catch (const std::system_error&) {  // too many threads
      connections_.erase(socket);
      ::close(socket);
    }
  }
  ::close(listening);
}

void Server::stop_listening() {
  if (!stopping_.exchange(true) && listening_ >= 0) ::shutdown(listening_, SHUT_RDWR);
}

void Server::end_connections(double seconds) {
  std::unique_lock lock(mutex_);
  const auto none_left = [this] { return connections_.empty(); };
  if (changed_.wait_for(lock, std::chrono::duration<double>(seconds), none_left)) return;
  for (const int socket : connections_) ::shutdown(socket, SHUT_RDWR);
  changed_.wait(lock, none_left);
}

void Server::serve(int socket) {
  {
    Connection connection(socket, settings_);
    double wait = settings_.header_seconds;
    try {
      while (connection.wait_for_request(wait, stopping_) && serve_one(connection, stopping_)) wait = kKeepAlive;
    } catch (const std::exception&) {
      // A stream that failed is cut off: its client sees that the end is missing.
    }
    connection.finish();
  }
  const std::lock_guard lock(mutex_);
  ::close(socket);
  connections_.erase(socket);
  changed_.notify_all();
}

bool Server::serve_one(Connection& connection, bool last) {
  Current current(connection);
  current_ = &current;
  connection.begin_headers();
  bool closed = false;
  const bool sent =
      process_request(connection, last, closed, [&](httplib::Request& request) { prepare(request, current); });
  current_ = nullptr;
  return sent && current.parsed && !closed && !last && !connection.unread();
}

// Takes out of a request what the library would act on by itself: ranges, compression, forms, and its search for a
// handler by regular expressions.
void Server::prepare(httplib::Request& request, Current& current) const {
  current.parsed = true;
  current.path = std::move(request.path);
  request.path = "/";
  request.ranges.clear();
  for (const char* name : {"Range", "Accept-Encoding", "Content-Encoding"}) request.headers.erase(name);
  if (request.is_multipart_form_data()) request.headers.erase("Content-Type");
  // A body that nobody reads would be taken for the next request.
  current.connection.set_unread(announces_body(request));
  current.connection.begin_body();
}

void Server::handle(const httplib::Request& request, httplib::Response& response,
                    const httplib::ContentReader* reader) {
  Exchange exchange(request, response, current_->connection, current_->path, reader);
  current_->guard = answer_(exchange);
}

void Server::set_handlers() {
  set_keep_alive_timeout(static_cast<time_t>(kKeepAlive));
  set_payload_max_length(settings_.most_bytes * HttpSettings::kReadFurther);
  set_pre_routing_handler([this](const httplib::Request& request, httplib::Response& response) {
    if (request.method == "POST") return HandlerResponse::Unhandled;
    handle(request, response, nullptr);
    return HandlerResponse::Handled;
  });
  Post("/", [this](const httplib::Request& request, httplib::Response& response, const httplib::ContentReader& reader) {
    handle(request, response, &reader);
  });
  // A client that asks first does not send a body that is refused.
  set_expect_100_continue_handler([this](const httplib::Request& request, httplib::Response& response) {
    if (request.get_header_value<std::uint64_t>("Content-Length") <= settings_.most_bytes) return 100;
    answer(response, too_large(settings_));
    return response.status;
  });
  set_error_handler(HandlerWithResponse([](const httplib::Request&, httplib::Response& response) {
    if (response.body.empty()) answer(response, ApiError(response.status, problem_of(response.status)));
    return HandlerResponse::Handled;
  }));
  set_post_routing_handler([](const httplib::Request&, httplib::Response& response) {
    if (current_ == nullptr || !current_->connection.unread()) return;
    response.headers.erase("Keep-Alive");
    response.headers.erase("Connection");
    response.set_header("Connection", "close");
  });
}

}  // namespace service
