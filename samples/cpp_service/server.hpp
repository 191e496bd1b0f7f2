// Accepts connections, and hands each request to a function in the connection's thread.
#pragma once

#include <httplib.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "connection.hpp"
#include "settings.hpp"

namespace service {

// A request whose headers were read, and its answer.
class Exchange {
 public:
  Exchange(const httplib::Request& request, httplib::Response& response, Connection& connection, std::string path,
           const httplib::ContentReader* reader)
      : request_(request), response_(response), connection_(connection), path_(std::move(path)), reader_(reader) {}

  const std::string& method() const { return request_.method; }
  const std::string& path() const { return path_; }
  std::string header(const char* name) const { return request_.get_header_value(name); }
  Connection& connection() { return connection_; }
  httplib::Response& response() { return response_; }

  // Reads the body. Throws ApiError for one that is too large or comes too slowly.
  std::string body(const HttpSettings& settings);

 private:
  void check_length(const HttpSettings& settings) const;

  const httplib::Request& request_;
  httplib::Response& response_;
  Connection& connection_;
  std::string path_;
  const httplib::ContentReader* reader_;
};

// A part of the server that lives as long as a request, its stream included.
using Guard = std::shared_ptr<void>;
// Answers a request; must not throw. What it returns is kept until the answer was sent.
using Answering = std::function<Guard(Exchange&)>;

// cpp-httplib's parser of requests and writer of answers, with a thread for each connection and bounds of our own.
class Server : private httplib::Server {
 public:
  // ``settings`` must live longer.
  Server(const HttpSettings& settings, Answering answering);
  ~Server() override;

  // Returns a socket that listens at an address; port 0 takes a free one, which ``port`` becomes. Throws Error for an
  // address that cannot be had.
  static int bind(const std::string& host, int& port);

  // Takes a socket, and accepts connections until stop_listening.
  void run(int listening);
  void stop_listening();
  // Waits some seconds for the connections to end, and ends the others.
  void end_connections(double seconds);

 private:
  struct Current;

  void serve(int socket);
  bool serve_one(Connection& connection, bool last);
  void prepare(httplib::Request& request, Current& current) const;
  void handle(const httplib::Request& request, httplib::Response& response, const httplib::ContentReader* reader);
  void set_handlers();

  static thread_local Current* current_;

  const HttpSettings& settings_;
  Answering answer_;
  std::atomic<int> listening_{-1};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<int> connections_;
};

}  // namespace service
