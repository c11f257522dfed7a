"""The grammar of service names."""

import re
from typing import Final

from idalloc_tcp.errors import BadName

NAME_CHARS_MAX: Final = 64

#: A service name, before it is folded.
NAME: Final = re.compile(rf"[A-Za-z0-9_.:-]{{1,{NAME_CHARS_MAX}}}")


def fold_name(text: str) -> str:
    """The one spelling of a service name: its lower case.

    Raises:
        BadName: `text` has a wrong length or a character that names may not have.
    """
    if NAME.fullmatch(text) is None:
        raise BadName(f"a name is 1 to {NAME_CHARS_MAX} of the characters A-Z a-z 0-9 _ . : -")
    return text.lower()
