# The ways back into ring 0: exceptions, system calls, interrupts.
#
# Each arrives on the ring-0 stack of its processor, which is empty then, and leaves by `iretq`.

    .text

# One stub of 16 bytes for each vector; Rust points the interrupt descriptor table at them.
    .balign 16
    .globl vector_stubs
vector_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if vector == 6
    jmp undefined_instruction
    .elseif vector >= 32
    push vector
    jmp interrupt
    .elseif vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
    push vector
    jmp exception
    .else
    push 0
    push vector
    jmp exception
    .endif
    .set vector, vector + 1
    .endr

# --- Interrupts ---------------------------------------------------------------------------------

    .set LOCAL_APIC_END_OF_INTERRUPT, 0xfee000b0
    .set SPURIOUS_VECTOR, 255

# The vector is on the stack.
    .balign 16
interrupt:
    push rax
    mov rax, [rsp + 8]
    lock inc qword ptr [rax * 8 + interrupt_counts]
    lock inc qword ptr [interrupt_total]
    cmp eax, SPURIOUS_VECTOR
    je 1f
    mov eax, LOCAL_APIC_END_OF_INTERRUPT
    mov dword ptr [rax], 0
1:  pop rax
    add rsp, 8
    iretq

# --- Exceptions ---------------------------------------------------------------------------------

# The vector and the error code are on the stack. Nothing here recovers from an exception: it is
# handed to Rust in ring 3, on a stack of its own, to be reported. A second one, raised while
# reporting the first, resets the machine.
    .balign 16
exception:
    cmp byte ptr [exception_raised], 0
    jne triple_fault
    mov byte ptr [exception_raised], 1
    pop rdi
    pop rsi
    mov rdx, [rsp]
    mov rcx, [rsp + 8]
    mov r8, [rsp + 24]
    mov r9, cr2
    push 0x1b
    push offset exception_stack_top - 8
    push 2
    push 0x23
    push offset ring_3_exception
    iretq

    .globl triple_fault
triple_fault:
    lidt [empty_interrupt_table]
    mov eax, 0xfff8
    mov ds, eax
    jmp triple_fault

# --- System calls -------------------------------------------------------------------------------

# `syscall` and `int` do not work on every host, the exception of `ud2` does. The only `ud2` that is
# a system call is the one at this address. Number in RAX, arguments in RDI, RSI and RDX, result in
# RAX; RCX, RDX, RSI and RDI are lost.
    .balign 16
    .globl system_call
system_call:
    ud2
    ret

    .balign 16
undefined_instruction:
    cmp qword ptr [rsp], offset system_call
    jne 1f
    cmp eax, {system_calls}
    jae 1f
    add qword ptr [rsp], 2
    mov eax, eax
    jmp [rax * 8 + system_calls]
1:  push 0
    push 6
    jmp exception

    .section .rodata
    .balign 8
system_calls:
    .quad read_port_8, read_port_16, read_port_32
    .quad write_port_8, write_port_16, write_port_32
    .quad write_serial
    .quad read_msr, write_msr
    .quad read_cr3, write_cr3
    .quad enable_interrupts, disable_interrupts
    .quad wait_for_interrupt
    .quad halt
    .quad triple_fault
    .quad unknown_instruction
empty_interrupt_table:
    .fill 10, 1, 0
    .text

read_port_8:
    mov edx, edi
    xor eax, eax
    in al, dx
    iretq
read_port_16:
    mov edx, edi
    xor eax, eax
    in ax, dx
    iretq
read_port_32:
    mov edx, edi
    in eax, dx
    iretq
write_port_8:
    mov edx, edi
    mov eax, esi
    out dx, al
    iretq
write_port_16:
    mov edx, edi
    mov eax, esi
    out dx, ax
    iretq
write_port_32:
    mov edx, edi
    mov eax, esi
    out dx, eax
    iretq

# EDX bytes from RSI to the 16550 at port EDI, once its transmitter is empty.
write_serial:
    mov ecx, edx
    lea edx, [rdi + 5]
1:  in al, dx
    test al, 0x20
    jz 1b
    mov edx, edi
    cld
    rep outsb
    iretq

read_msr:
    mov ecx, edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq
# RSI to MSR EDI.
write_msr:
    mov ecx, edi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    iretq

read_cr3:
    mov rax, cr3
    iretq
write_cr3:
    mov cr3, rdi
    iretq

# The interrupt flag of ring 3, in the flags that `iretq` restores.
enable_interrupts:
    or dword ptr [rsp + 16], 0x200
    iretq
disable_interrupts:
    and dword ptr [rsp + 16], 0xfffffdff
    iretq

# Halts until the number of interrupts taken by all processors is no longer RDI. Interrupts are off
# between the comparison and the halt, so none is missed.
wait_for_interrupt:
    cmp [interrupt_total], rdi
    jne 1f
    sti
    hlt
    cli
    jmp wait_for_interrupt
1:  iretq

halt:
    cli
    hlt
    jmp halt

# KVM's emulator does not know this instruction. It has to emulate it on any host, because the
# operand RDI is where there is no memory, and in ring 0 it reports that to user space.
unknown_instruction:
    popcnt eax, [rdi]
    iretq

    .data
    .balign 8
    .globl interrupt_total
    .globl interrupt_counts
interrupt_total:
    .quad 0
exception_raised:
    .quad 0

    .bss
    .balign 16
interrupt_counts:
    .skip 256 * 8
    .skip 0x2000
exception_stack_top:
    .text
