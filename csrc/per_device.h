// Remembers what a device was asked or told, because each time is a call into the driver. Launches
// may come from several threads.
#pragma once

#include <mutex>
#include <unordered_map>

namespace llave {

template <class Value>
class PerDevice {
 public:
  // The value that `make` returned at the first call for `device`.
  template <class Make>
  Value operator()(int device, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = values_.find(device);
    if (found == values_.end()) found = values_.emplace(device, make()).first;
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int, Value> values_;
};

}  // namespace llave
