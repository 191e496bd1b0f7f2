// A lock that refuses a second user instead of making it wait: two users' tokens would mix.
#pragma once

#include <atomic>

#include "dynexport/error.hpp"

namespace dynexport {

// What one user at a time can hold, from any thread.
class Claim {
 public:
  // ``refusal``: the message for a second user, one line.
  explicit Claim(const char* refusal) : refusal_(refusal) {}

  // Throws Error when another user holds it.
  void take() {
    if (taken_.test_and_set(std::memory_order_acquire)) throw Error(refusal_);
  }
  void give_back() { taken_.clear(std::memory_order_release); }

  // Holds a claim while it lives.
  class Held {
   public:
    explicit Held(Claim& claim) : claim_(claim) { claim_.take(); }
    ~Held() { claim_.give_back(); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

   private:
    Claim& claim_;
  };

 private:
  const char* refusal_;
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
};

}  // namespace dynexport
