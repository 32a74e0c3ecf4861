// Compiled into wheels alone (ESCORT_PORTABLE): what the headers of GCC 11 call when the size of an array overflows, which
// libstdc++ has had since then.
#include <new>

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
