"""Whether an error means that the memory was used up; for the fuzzer and for the tests of hostile files."""

from __future__ import annotations

import re


def short_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one behind it, says that there is no memory left."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search(r"out of memory|unable to allocate", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False
