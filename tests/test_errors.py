"""A message is one line of readable characters, whatever names it quotes."""

from __future__ import annotations

from seer_scale.errors import LONGEST, ConfigError, DataError, UserError


def test_control_characters_are_written_out() -> None:
    assert str(DataError("\x1b[2Jimage\n\x00\u202e.jpg")) == r"\x1b[2Jimage\n\x00\u202e.jpg"
    assert str(UserError("café, 写真 and \u00a0")) == r"café, 写真 and \xa0"


def test_a_long_message_is_cut() -> None:
    assert str(UserError("a" * LONGEST)) == "a" * LONGEST
    assert str(UserError("a" * (LONGEST + 1))) == "a" * LONGEST + "..."


def test_a_mistake_in_the_configuration_has_a_status_of_its_own() -> None:
    assert (UserError.exit_status, DataError.exit_status, ConfigError.exit_status) == (1, 1, 2)
