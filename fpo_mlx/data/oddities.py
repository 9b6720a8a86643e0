"""Characters and habits of text that are rarely meant, and that a model would learn."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ODD = re.compile(
    "["
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # controls, but for tab and line ends
    "\u200b\u2060\ufeff"  # zero-width (the joiners of scripts and emoji are fine)
    "\u202a-\u202e\u2066-\u2069"  # overrides of the writing direction
    "\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff"  # private use, no characters at all
    "\ufffd"  # what a decoder leaves where it failed
    "\U000e0000-\U000e007f"  # invisible tags
    "]"
)
# UTF-8 read as Latin-1 or Windows-1252: "â€™" for an apostrophe, "Ã©" for "é"
_MOJIBAKE = re.compile("â€[\x80-\xbf™œ“”˜¦¢]|Ã[\x80-\xbf]|Â[\xa0-\xbf]")


def odd_text(text: str) -> str | None:
    """What is odd about a text, with the place of the first oddity; None if nothing is."""
    found = _ODD.findall(text)
    if found:
        char = found[0]
        name = unicodedata.name(char, "a control or private character")
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return f"U+{ord(char):04X} ({name}) at character {text.index(char) + 1}{more}"
    match = _MOJIBAKE.search(text)
    if match:
        return f"{match.group()!r} at character {match.start() + 1} looks like wrongly read UTF-8"
    return None


def control_token_in(text: str, control_tokens: Sequence[str]) -> str | None:
    """The first of the tokenizer's control tokens that is written out in the text, or None."""
    return next((token for token in control_tokens if token in text), None)
