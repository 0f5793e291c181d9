"""Numbers spelled in words: `twenty-one`, `three quarters`, Chinese and Japanese `一百零五`, `1.5万`, `二分之一`."""

import re
from fractions import Fraction

_HAN_DIGITS = {
    sign: value
    for value, signs in enumerate(
        ("\u3007零", "一壹", "二两兩贰", "三叁", "四肆", "五伍", "六陆", "七柒", "八捌", "九玖")
    )
    for sign in signs
}
_HAN_SMALL = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_HAN_LARGE = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "兆": 10**12}
_HAN = "".join([*_HAN_DIGITS, *_HAN_SMALL, *_HAN_LARGE])
_HAN_NUMBER = rf"[{_HAN}]+(?:[点點・][{''.join(_HAN_DIGITS)}]+)?"
_MINUS = r"(?:负|負|マイナス)\s*"
_COUNTED = re.compile(
    rf"(?P<minus>{_MINUS})?(?:(?P<percent>百分之)(?P<share>{_HAN_NUMBER}|[\d.]+)|(?P<below>{_HAN_NUMBER}|\d+)分之"
    rf"(?P<above>{_HAN_NUMBER}|\d+)|(?P<number>{_HAN_NUMBER}))"
)
# Digits before a sign for ten thousand: 1.5万, and 3億5000万.
_MIXED = re.compile(r"\d+(?:\.\d+)?\s?[千万萬亿億兆]+(?:\d+(?:\.\d+)?[千万萬亿億]+)*(?:\d+(?![\d.]))?")
_MIXED_PART = re.compile(r"(\d+(?:\.\d+)?)\s?([千万萬亿億兆]*)")
_HAN_COUNTER = "个個只枚本人名元円圆块米天日年岁歳つ公里千克克斤吨度分秒时時小回次种種件条條张張辆台页頁"

_UNITS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split(),
        range(20),
        strict=True,
    )
)
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "hundredth": 100,
}  # fmt: skip
_WORDS = frozenset(
    {*_UNITS, *_TENS, *_SCALES, *_PARTS, *(f"{word}s" for word in _PARTS)}
    | set("halves and a an minus negative".split())
)
_WORD = re.compile(r"(?P<gap>[\s-]*)(?P<word>[A-Za-z]+)(?![\w'\u2019])")
_COUNTS = "|".join(word for word in [*_UNITS, *_TENS, "hundred", "thousand", "dozen"] if word not in ("zero", "one"))
# With a capital it is part of a name: The Three Musketeers.
_SPELLED_AT_END = re.compile(
    rf"(?<![\w-])(?P<said>(?:(?:minus|negative)\s+)?(?:an?\s+(?=hundred|thousand|dozen))?(?:{_COUNTS})(?:[\s-]+(?:{_COUNTS}|and|one))*(?![\w-])"
    r"(?:\s+(?!and\b|or\b|of\b|more\s+than\b)[a-z]+){0,3})[.!*\s]*$"
)
_LONGEST_SPELLED = 120
_AND_A_PART = re.compile(r"^(\d+)\s+and\s+(?:a|one)\s+(half|third|quarter)\b", re.IGNORECASE)
# Half an hour, three quarters of a mile.
_OF_A = re.compile(r"^\s+(?:of\s+)?an?\s+(?=[A-Za-z])", re.IGNORECASE)
_SIGN = re.compile(r"(?:minus|negative)\s+(?=\$?[\d.])", re.IGNORECASE)


def in_digits(answer: str) -> str:
    """A short answer that begins with a spelled number, with that in digits: `twenty-one apples` as `21 apples`.

    For an answer that stands alone: in running text `one`, `a` and `一` are as often no number.
    """
    text = _AND_A_PART.sub(lambda match: f"{match[1]} 1/{_PARTS[match[2].lower()]}", signs_in_digits(answer).lstrip())
    found = _COUNTED.match(text)
    if found:
        value = _han_match(found)
        if value is not None:
            return value + text[found.end() :]
    words = _words_at_start(text)
    for count in range(len(words), 0, -1):
        number = _english([word for word, _ in words[:count]])
        rest = text[words[count - 1][1] :]
        # Part of a longer word: twenty-first.
        if number is not None and not re.match(r"-[A-Za-z]", rest):
            return number + (_OF_A.sub(" ", rest) if "/" in number else rest)
    return _SIGN.sub("-", text, count=1) if _SIGN.match(text) else text


def signs_in_digits(text: str) -> str:
    """Running text with `1.5万` as 15000, `负5` as -5, `百分之5` as 5% and `3分之1` as 1/3.

    These are always numbers, whatever stands around them.
    """
    if text.isascii():
        return text
    text = re.sub(rf"正\s*{_MINUS}(?=[\d.])", r"\\pm ", text)
    text = re.sub(rf"{_MINUS}(?=[\d.])", "-", text)
    text = _MIXED.sub(_mixed_value, text)
    text = re.sub(r"百分之\s?(\d+(?:\.\d+)?)", r"\1%", text)
    return re.sub(r"(\d+)分之(\d+)", r"\2/\1", text)


def last_counted(text: str) -> str | None:
    """The last number in Chinese characters that a counter follows, in digits: the 12 of 一共有十二个苹果."""
    found = None
    for match in _COUNTED.finditer(text):
        counted = text[match.end() : match.end() + 1]
        if counted and counted in _HAN_COUNTER and not (match["number"] and len(match[0]) == 1 and match[0] == "一"):
            found = _han_match(match)
    return found


def last_spelled(text: str) -> str | None:
    """The number in words that a text without digits ends with, and what it counts: `8 apples` of `... eight apples.`

    In running text `one` and `a` are no numbers.
    """
    match = _SPELLED_AT_END.search(text[-_LONGEST_SPELLED:])
    return in_digits(match["said"]) if match and not any(map(str.isdigit, text)) else None


def _han_match(match: re.Match[str]) -> str | None:
    sign = "-" if match["minus"] else ""
    if match["percent"]:
        share = _han_value(match["share"])
        return f"{sign}{share}%" if share is not None else None
    if match["below"]:
        below, above = _han_value(match["below"]), _han_value(match["above"])
        return f"{sign}{above}/{below}" if below is not None and above is not None else None
    number = _han_value(match["number"])
    return f"{sign}{number}" if number is not None else None


def _han_value(text: str) -> str | None:
    """A number in Chinese characters, as digits."""
    if text[:1].isdigit():
        return text
    whole, _, decimals = (part for part in re.match(r"([^点點・]*)([点點・]?)(.*)", text).groups())  # type: ignore[union-attr]
    value = _han_whole(whole)
    if value is None:
        return None
    return f"{value}.{''.join(str(_HAN_DIGITS[digit]) for digit in decimals)}" if decimals else str(value)


def _han_whole(text: str) -> int | None:
    if text and all(character in _HAN_DIGITS for character in text):
        return int("".join(str(_HAN_DIGITS[character]) for character in text))
    total = section = digit = 0
    seen = False
    last = 1
    for character in text:
        if character in _HAN_DIGITS:
            if digit:
                return None
            digit, seen = _HAN_DIGITS[character], True
            last = 10 if digit == 0 else last
        elif character in _HAN_SMALL:
            last = _HAN_SMALL[character]
            section += (digit or (1 if not seen or last == 10 else 0)) * last
            digit, seen = 0, True
        else:
            last = _HAN_LARGE[character]
            total += (section + digit) * last
            section = digit = 0
    # 一百五 is 150, 一百零五 is 105.
    scale = last // 10 if digit and last >= 100 and not set("\u3007零") & set(text) else 1
    return total + section + digit * scale if seen else None


def _mixed_value(match: re.Match[str]) -> str:
    value = Fraction(0)
    for number, signs in _MIXED_PART.findall(match[0]):
        factor = 1
        for sign in signs:
            factor *= _HAN_SMALL.get(sign) or _HAN_LARGE[sign]
        value += Fraction(number) * factor
    return str(value.numerator) if value.denominator == 1 else str(float(value))


def _words_at_start(text: str) -> list[tuple[str, int]]:
    """The words of numbers that `text` begins with, and where each ends."""
    found: list[tuple[str, int]] = []
    match = _WORD.match(text)
    while match and match["word"].lower() in _WORDS:
        found.append((match["word"].lower(), match.end()))
        match = _WORD.match(text, match.end())
    return found


def _english(words: list[str]) -> str | None:
    """A number from its words: `3`, `-5`, `3/4`, `2 1/2`; None where they are none, or only the beginning of one."""
    sign = "-" if words[0] in ("minus", "negative") else ""
    words = words[1:] if sign else words
    if not words or words[-1] in ("and", "a", "an") or words[0] == "and":
        return None
    part = _part(words[-1])
    if part is None:
        whole = _whole(words)
        return f"{sign}{whole}" if whole is not None else None
    words = words[:-1]
    if len(words) > 2 and words[-2] == "and" and words[-1] in ("a", "an", "one"):
        whole = _whole(words[:-2])
        return f"{sign}{whole} 1/{part}" if whole is not None else None
    count = 1 if words in ([], ["a"], ["an"]) else _whole(words)
    return f"{sign}{count}/{part}" if count is not None else None


def _part(word: str) -> int | None:
    return 2 if word == "halves" else _PARTS.get(word) or _PARTS.get(word.removesuffix("s"))


def _whole(words: list[str]) -> int | None:
    """The value of number words in an order that makes one number; None for `six seven` or `twenty forty`."""
    total = current = 0
    # What may still be added: less than ten after twenty, less than a hundred after two hundred.
    room = 1000
    for place, word in enumerate(words):
        if word == "and":
            if room not in (100, 1000) or place in (0, len(words) - 1):
                return None
        elif word in ("a", "an"):
            if place or (words[1:2] and words[1] not in _SCALES):
                return None
            current, room = 1, 0
        elif word in _UNITS or word in _TENS:
            value = _UNITS.get(word, _TENS.get(word, 0))
            if value >= room:
                return None
            current, room = current + value, 10 if word in _TENS else 0
        elif word in ("hundred", "dozen"):
            if current >= 100:
                return None
            current, room = (current or 1) * _SCALES[word], 100 if word == "hundred" else 0
        else:
            total, current, room = total + (current or 1) * _SCALES[word], 0, 1000
    return total + current
