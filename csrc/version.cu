// Which release and which sources this library was built from; csrc/build.py passes the text.

#ifndef EP_MOE_VERSION
#error "EP_MOE_VERSION is not defined: compile with csrc/build.py"
#endif

extern "C" __attribute__((visibility("default"))) const char* ep_moe_version() { return EP_MOE_VERSION; }
