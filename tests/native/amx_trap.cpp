// Runs the tile instructions as they were compiled on a processor that has none: the fault that each causes is answered by the
// loops of amx_instructions.h. What the loops in their place cannot show is thereby checked: the instructions' encodings, registers
// and addresses, and that the compiler has the memory written that they read. Linux on x86-64 alone.
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx_instructions.h"

namespace {

std::atomic<long> answered{0};

[[noreturn]] void refuse(const uint8_t* code) {
  std::fprintf(stderr, "AMX trap: not a tile instruction:");
  for (int i = 0; i < 8; ++i) std::fprintf(stderr, " %02x", code[i]);
  std::fprintf(stderr, "\n");
  std::_Exit(1);
}

int64_t general(const ucontext_t* context, int number) {
  constexpr int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[places[number]];
}

// A memory operand; `length` is first that of what comes before it.
struct Address {
  int64_t base = 0, index = 0;
  int length;

  Address(const ucontext_t* context, const uint8_t* code, int modrm, bool far_index, bool far_base) : length(5) {
    const int mode = modrm >> 6;
    bool wide = mode == 2, absolute = false;
    if ((modrm & 7) == 4) {
      const uint8_t sib = code[length++];
      const int i = (sib >> 3 & 7) + 8 * far_index;
      if (i != 4) index = general(context, i) << (sib >> 6);
      absolute = (sib & 7) == 5 && mode == 0;
      if (!absolute) base = general(context, (sib & 7) + 8 * far_base);
      wide |= absolute;
    } else if ((modrm & 7) == 5 && mode == 0) {
      base = reinterpret_cast<int64_t>(code) + length + 4, wide = true;  // relative to the next instruction
    } else {
      base = general(context, (modrm & 7) + 8 * far_base);
    }
    if (mode == 1) base += static_cast<int8_t>(code[length++]);
    if (!wide) return;
    int32_t offset;
    std::memcpy(&offset, code + length, 4);
    base += offset, length += 4;
  }
};

// All are VEX-encoded in three bytes, with the opcodes of the map 0F38, and 128 bits wide.
void answer(int, siginfo_t*, void* at_fault) {
  namespace amx = zsl::amx_instructions;
  auto* context = static_cast<ucontext_t*>(at_fault);
  const auto* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  if (code[0] != 0xc4 || (code[1] & 0x9f) != 0x82 || (code[2] & 0x84) != 0) refuse(code);
  const int prefix = code[2] & 3, third = ~code[2] >> 3 & 15, opcode = code[3], modrm = code[4];
  const int first = modrm >> 3 & 7, second = modrm & 7;
  const bool registers = modrm >> 6 == 3;
  const int kind = opcode << 4 | prefix << 1 | registers;
  int length = 5;
  if (registers) {
    if (kind == 0x491 && modrm == 0xc0)
      amx::release();
    else if (kind == 0x497)
      amx::zero(first);
    else if (kind == 0x5c5)
      amx::multiply(first, second, third);
    else
      refuse(code);
  } else {
    const Address from(context, code, modrm, !(code[1] & 0x40), !(code[1] & 0x20));
    length = from.length;
    if (kind == 0x490 && first == 0)
      amx::load_config(reinterpret_cast<const void*>(from.base + from.index));
    else if (kind == 0x4b6)
      amx::load(first, reinterpret_cast<const void*>(from.base), from.index);
    else if (kind == 0x4b4)
      amx::store(first, reinterpret_cast<void*>(from.base), from.index);
    else
      refuse(code);
  }
  context->uc_mcontext.gregs[REG_RIP] += length;
  ++answered;
}

}  // namespace

void trap_amx_instructions() {
  struct sigaction action = {};
  action.sa_sigaction = answer, action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  std::atexit([] { std::printf("%ld tile instructions answered\n", answered.load()); });
}
