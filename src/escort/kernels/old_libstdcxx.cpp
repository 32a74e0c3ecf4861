// Compiled into wheels alone (ESCORT_PORTABLE), with eh_ptr.o of libstdc++: what the headers of GCC 11 call when
// the size of an array overflows, which libstdc++ has had since then; and what eh_ptr.o calls and libstdc++ hides.
#include <cstdlib>
#include <exception>
#include <new>

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

namespace __cxxabiv1 {
[[noreturn]] void __terminate(std::terminate_handler handler) noexcept {
  handler();
  std::abort();
}
}  // namespace __cxxabiv1
