"""What may be the name of a service, and that it has one spelling."""

import string
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from idalloc_tcp.errors import BadName
from idalloc_tcp.names import NAME_CHARS_MAX, fold_name

FOLDED_CHARS: Final = string.ascii_lowercase + string.digits + "_.:-"
CHARS: Final = FOLDED_CHARS + string.ascii_uppercase


@settings(deadline=None)
@given(st.text(CHARS, min_size=1, max_size=NAME_CHARS_MAX))
def test_the_one_spelling_is_the_lower_case(name: str) -> None:
    """Every text of 1 to 64 allowed characters is a name, in any case the same one."""
    folded = fold_name(name)
    assert folded == name.lower()
    assert fold_name(name.swapcase()) == folded
    assert fold_name(folded) == folded


@pytest.mark.parametrize("char", CHARS)
def test_each_character_may_stand_alone(char: str) -> None:
    """Every allowed character is a name by itself, and so may begin and end one."""
    assert fold_name(char) == char.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * (NAME_CHARS_MAX + 1),
        "a b",
        " a",
        "a ",
        "a\n",
        "a\r",
        "\ta",
        "a\0",
        "a/b",
        "a@b",
        "@a",
        "a*",
        "a;b",
        "{a}",
        "naïve",
        "ＯＲＤＥＲＳ",  # full-width letters
        "\N{KELVIN SIGN}",  # its lower case is an ASCII k
        "a\N{ARABIC-INDIC DIGIT ONE}",
    ],
)
def test_what_is_no_name(text: str) -> None:
    """A wrong length or any other character is refused, with a printable reason of one line."""
    with pytest.raises(BadName) as caught:
        fold_name(text)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@settings(deadline=None)
@given(st.text(max_size=NAME_CHARS_MAX + 2))
@example("orders\n")
def test_any_text_is_a_name_or_refused(text: str) -> None:
    """Whatever comes back consists of 1 to 64 of the folded characters; the rest is BadName."""
    try:
        folded = fold_name(text)
    except BadName:
        assert not 1 <= len(text) <= NAME_CHARS_MAX or not set(text) <= set(CHARS)
    else:
        assert 1 <= len(folded) <= NAME_CHARS_MAX
        assert set(folded) <= set(FOLDED_CHARS)
