"""The filter of system calls of a sandbox, as a program for the kernel (seccomp).

Namespaces do not separate everything. The keys of the session that started a sandbox can be read
and written in it, so an agent could read what is secret there, and leave notes for the next
episode. And a few calls that no agent needs have often had mistakes by which programs got out. The
filter answers all of them with EPERM. (Docker's default profile refuses them too.)
"""

from __future__ import annotations

import errno
import struct

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of linux/audit.h by the name of the machine."""
_REFUSED = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
"""The numbers of a call on each of the machines."""
_OTHER_ABI = 0x40000000
"""From here on x86_64 has its calls a second time (x32)."""
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _MACHINE_AT = 0, 4
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


def filter_program(machine: str) -> bytes:
    """The program for a machine as `uname -m` names it; empty where the numbers are not known."""
    if machine not in _MACHINES:
        return b""
    column = [*_MACHINES].index(machine)
    numbers = sorted(numbers[column] for numbers in _REFUSED.values())
    refusal = len(numbers) + 1
    """How far the last lines are from the line after the number is loaded."""
    lines = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_EQUAL, 1, 0, _MACHINES[machine]),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),  # a program for another machine
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, refusal, 0, _OTHER_ABI),
        *((_EQUAL, refusal - place, 0, number) for place, number in enumerate(numbers, 1)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
