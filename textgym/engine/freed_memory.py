"""What becomes of memory that a CPU process frees: given back to the system, or kept for what is allocated next.

The GNU C library takes blocks of 32 MiB and more from the system each time, and gives them back when they are freed.
The system fills every page of such a block with zeros when it is first touched. A large model allocates gradients and
logits anew in each optimizer step, and with 135 million weights this alone took 8 % of an update and more
(``docs/speed.md``). Kept memory is there already.
"""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

# By these a user says what the C library is to do.
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it allocates next.

    It holds for the whole process, until its end. Nothing happens where the C library is not GNU's, or the environment
    has settings for it: ``MALLOC_TRIM_THRESHOLD_`` and its like, or ``glibc.malloc`` in ``GLIBC_TUNABLES``.

    :return: whether it is kept from now on
    """
    chosen = any(name in os.environ for name in SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt  # returns 1 where it could be set
    return bool(set_option(M_MMAP_MAX, 0)) and bool(set_option(M_TRIM_THRESHOLD, -1))
