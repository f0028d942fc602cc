"""Lines as a reader takes them, whatever letters and marks they are written with."""

from __future__ import annotations

import unicodedata

# Letters of other scripts that look like Latin ones, capitals and small ones: what stands below what it looks like.
_LATIN = "AaBbCcDdEeFfGgHhIiJjKkLlMmNnOoPpQqRrSsTtUuVvWwXxYyZz"
_ALIKE = {
    "A": "АΑᗅ", "a": "аαɑ", "B": "ВΒᏴ", "b": "ЬƄ", "C": "СϹᏟ", "c": "сϲᴄ", "D": "ᎠᗞÐĐ", "d": "ԁđɗ", "E": "ЕΕᎬ", "e": "еєεҽ",
    "F": "ϜᖴҒ", "f": "ƒғ", "G": "ԌᏀ", "g": "ɡց", "H": "НΗᎻ", "h": "һհћ", "I": "ІΙӀ", "i": "іιı", "J": "ЈᎫ", "j": "јϳ",
    "K": "КΚᏦ", "k": "кκ", "L": "ᏞⅬŁ", "l": "ӏłⅼ", "M": "МΜᎷ", "m": "мᴍ", "N": "ΝɴИ", "n": "пηո", "O": "ОΟՕØ", "o": "оοօσø",
    "P": "РΡᏢ", "p": "рρ", "Q": "ԚႳ", "q": "ԛգ", "R": "ᎡᖇЯ", "r": "гᴦɼ", "S": "ЅՏᏚ", "s": "ѕꜱ", "T": "ТΤᎢ", "t": "тτ",
    "U": "ՍᑌЏ", "u": "υսц", "V": "ѴᏙ", "v": "νѵ", "W": "ԜᎳ", "w": "ԝω", "X": "ХΧ", "x": "хχ", "Y": "УΥҮ", "y": "уγү",
    "Z": "ΖᏃ", "z": "ᴢʐ",
}  # fmt: skip
_TABLE = str.maketrans({other: latin for latin, others in _ALIKE.items() for other in others})
_OTHER = "ж"  # stands for any letter of another script that looks like none of these, or was not thought of


def undisguised(line: str) -> str:
    """A line in small letters without accents and invisible characters, in which look-alikes are Latin letters.

    Letters of other scripts that are left are all one; `letters` takes that for any.
    """
    shown = "".join(
        c
        for c in unicodedata.normalize("NFKD", line)
        if unicodedata.category(c) not in ("Cf", "Cc", "Mn", "Me", "Mc") or c == "\t"
    )
    latin = unicodedata.normalize("NFKD", shown.translate(_TABLE)).casefold()
    return "".join(_OTHER if c.isalpha() and not c.isascii() else c for c in latin)


def letters(words: str) -> str:
    """A regular expression for words in an undisguised line, in any spacing and with any marks between them.

    A letter of another script counts as whichever letter is wanted there.
    """
    # No step back into a gap: it would take time that grows with its square.
    return r"[\W_]*+".join(f"[{c}{_OTHER}]" for c in undisguised(words) if c.isalnum())
