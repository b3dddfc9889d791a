"""Reading files that others have written: whatever a library raises over them is one message for the user."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from peftune.errors import PeftuneError, out_of_memory


@contextlib.contextmanager
def reading(fault: Callable[[str], PeftuneError]) -> Iterator[None]:
    """Around a library's reading of a config, a tokenizer, weights or an adapter.

    Libraries raise what they like where a file is not as they wrote it: TypeError, IndexError, from Rust a bare
    Exception.

    Args:
        fault: reason -> the error to raise.

    Raises:
        PeftuneError: what `fault` makes of the library's error. Ours, and a lack of memory, pass as they are.
    """
    try:
        yield
    except PeftuneError:
        raise
    except Exception as error:  # there is no narrower type
        if out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:600]
        raise fault(said or type(error).__name__) from error
