# From the monitor to ring 3.
#
# Two ways in, one way on: PVH enters `pvh_entry` in 32-bit protected mode without paging, with RBX
# at its start info; the 64-bit Linux boot protocol enters `linux64_entry` in long mode with RSI at
# the zero page. Both end in `start_in_ring_3`, which leaves ring 0 for good: from then on only
# exceptions, system calls and interrupts come back to it.
#
# Every instruction here may be emulated by KVM at half a microsecond each, so tables are filled in
# by the assembler as far as it can and by Rust in ring 3 where it cannot.

    .set RING_0_CODE, 0x08
    .set RING_3_DATA, 0x1b
    .set RING_3_CODE, 0x23
    .set FIRST_TASK_STATE, 0x28

    .set CR0_PE_MP_ET_NE_PG, 0x80000033
    .set CR4_PAE_OSFXSR_OSXMMEXCPT, 0x620
    .set MSR_EFER, 0xc0000080
    .set EFER_LME, 0x100

    .set PROTOCOL_PVH, 0
    .set PROTOCOL_LINUX64, 1

    # XEN_ELFNOTE_PHYS32_ENTRY, a 64-bit value as Linux has it.
    .section .note.pvh, "a", @note
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

    .section .text.entry, "ax"
    .code32
pvh_entry:
    cld
    mov esi, ebx
    lgdt [gdt_pointer]
    mov eax, offset page_map_level_4
    mov cr3, eax
    mov eax, CR4_PAE_OSFXSR_OSXMMEXCPT
    mov cr4, eax
    mov ecx, MSR_EFER
    mov eax, EFER_LME
    xor edx, edx
    wrmsr
    mov eax, CR0_PE_MP_ET_NE_PG
    mov cr0, eax
    # ljmp RING_0_CODE, pvh_long_mode
    .byte 0xea
    .long pvh_long_mode
    .word RING_0_CODE

    .code64
pvh_long_mode:
    mov edi, PROTOCOL_PVH
    jmp start_in_ring_3

    .globl linux64_entry
linux64_entry:
    cli
    cld
    lgdt [gdt_pointer]
    mov eax, offset page_map_level_4
    mov cr3, rax
    mov eax, CR4_PAE_OSFXSR_OSXMMEXCPT
    mov cr4, rax
    mov eax, CR0_PE_MP_ET_NE_PG
    mov cr0, rax
    mov edi, PROTOCOL_LINUX64

# EDI is the protocol, RSI what it passed.
start_in_ring_3:
    lidt [idt_pointer]
    mov eax, offset task_states
    mov [gdt_task_states + 2], ax
    shr eax, 16
    mov [gdt_task_states + 4], al
    mov [gdt_task_states + 7], ah
    mov eax, FIRST_TASK_STATE
    ltr ax
    mov esp, offset boot_ring_0_stack_top
    push RING_3_DATA
    push offset boot_ring_3_stack_top - 8
    push 2
    push RING_3_CODE
    push offset ring_3_start
    iretq

# --- Application processors ---------------------------------------------------------------------

# Copied to a page below 1 MiB, where the start-up interrupt makes a processor begin in real mode.
    .section .rodata.trampoline, "a"
    .balign 16
    .globl trampoline
    .globl trampoline_end
    .code16
trampoline:
    cli
    mov ax, cs
    mov ds, ax
    # o32 lgdt [trampoline_gdt_pointer - trampoline]
    .byte 0x66, 0x0f, 0x01, 0x16
    .word trampoline_gdt_pointer - trampoline
    mov eax, offset page_map_level_4
    mov cr3, eax
    mov eax, CR4_PAE_OSFXSR_OSXMMEXCPT
    mov cr4, eax
    mov ecx, MSR_EFER
    mov eax, EFER_LME
    xor edx, edx
    wrmsr
    mov eax, CR0_PE_MP_ET_NE_PG
    mov cr0, eax
    # o32 ljmp RING_0_CODE, application_processor_long_mode
    .byte 0x66, 0xea
    .long application_processor_long_mode
    .word RING_0_CODE
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .section .text.entry, "ax"
    .code64
application_processor_long_mode:
    lidt [idt_pointer]
    mov ax, [application_processor_task_state]
    ltr ax
    mov esp, [application_processor_ring_0_stack_top]
    mov edi, [application_processor_index]
    push RING_3_DATA
    push [application_processor_ring_3_stack_top]
    push 2
    push RING_3_CODE
    push offset ring_3_application_processor
    iretq

# --- Tables -------------------------------------------------------------------------------------

    .data
    .balign 16
    # One processor comes up at a time, with what the boot processor left here for it.
    .globl application_processor_task_state
    .globl application_processor_ring_0_stack_top
    .globl application_processor_ring_3_stack_top
    .globl application_processor_index
application_processor_ring_3_stack_top:
    .quad 0
application_processor_ring_0_stack_top:
    .long 0
application_processor_index:
    .long 0
application_processor_task_state:
    .long 0

    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08: ring 0 code, 64-bit
    .quad 0x00cf93000000ffff        # 0x10: ring 0 data
    .quad 0x00cff3000000ffff        # 0x18: ring 3 data
    .quad 0x00affb000000ffff        # 0x20: ring 3 code, 64-bit
    # 0x28: a task state segment for each processor; Rust sets the bases of all but the first.
    .globl gdt_task_states
gdt_task_states:
    .rept {processors}
    .quad 0x0000890000000067, 0
    .endr
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad interrupt_descriptor_table

    # Of a task state segment only RSP0 matters here.
    .balign 16
    .globl task_states
task_states:
    .long 0
    .quad boot_ring_0_stack_top
    .fill 104 - 12, 1, 0
    .fill 104 * ({processors} - 1), 1, 0

    # Identity map of the first 4 GiB in pages of 2 MiB that ring 3 may use: present, writable,
    # user, accessed, dirty; from 3 GiB up, where the devices are, uncached as well.
    .balign 4096
    .globl page_map_level_4
page_map_level_4:
    .quad page_directory_pointers + 0x27
    .fill 511, 8, 0
    .globl page_directory_pointers
page_directory_pointers:
    .quad page_directories + 0x27
    .quad page_directories + 0x1027
    .quad page_directories + 0x2027
    .quad page_directories + 0x3027
    .fill 508, 8, 0
page_directories:
    .set address, 0
    .rept 1536
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr
    .rept 512
    .quad address + 0xf7
    .set address, address + 0x200000
    .endr

    .bss
    .balign 4096
    .globl interrupt_descriptor_table
interrupt_descriptor_table:
    .skip 4096
    .skip 0x400
boot_ring_0_stack_top:
    .skip 0x10000
boot_ring_3_stack_top:
    .text
