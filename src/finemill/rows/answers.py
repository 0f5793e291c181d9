r"""The final answer of a worked solution, as its writer put it.

Looked for after the thinking block. An explicit answer counts first: the last `\boxed{...}`, a last `#### 72`, what
directly follows "the answer is". Otherwise it is the last thing with a number in it, taken whole: of 3/4 the fraction,
of "2 or 3" both, of "x - 2" the expression, of 十二个 the 12. A model is not called wrong for leaving out a box, nor
right for a piece of what it said.
"""

import re
from bisect import bisect
from dataclasses import dataclass

from finemill.rows.bounds import with_its_words
from finemill.rows.channels import thinking_in_blocks
from finemill.rows.characters import plain_characters
from finemill.rows.chemistry import chemical_formulas
from finemill.rows.dates import dates
from finemill.rows.formulas import CONDITION, Span, boxed, formulas, strip_delimiters, tidy
from finemill.rows.numerals import in_digits, last_counted, last_spelled
from finemill.rows.repeats import shorter_repeats
from finemill.rows.results import without_circumstances
from finemill.rows.thinking import OTHER_TAGS

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# What models of other families write for the same: Magistral, Seed, Command A, Granite, Kimi, OpenThinker, Gemma and
# others.
_NAMES = "think thinking thought thoughts scratchpad reasoning reflection antthinking seed:think".split()
OPEN_MARKS = (
    *(f"<{name}>" for name in _NAMES),
    *OTHER_TAGS,
    *("<|thinking|>", "<|channel>thought", "<unused94>thought", "<unused94>"),
)
CLOSE_MARKS = (
    *(f"</{name}>" for name in _NAMES),
    *OTHER_TAGS.values(),
    *("<|/thinking|>", "<channel|>", "<unused95>"),
)
OPENS, CLOSES = (
    re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))), re.IGNORECASE)
    for marks in (OPEN_MARKS, CLOSE_MARKS)
)

# What ends a turn, where a program kept it in the text, with what a model wrote after it.
_TURN_ENDS = re.compile(
    r"<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<\|end_of_text\|>|<\|endoftext\|>"
    r"|</s>(?![\"'`}])|<end_of_turn>|<turn\|>|<eos>"
    "|<\uff5cend\u2581of\u2581sentence\uff5c>"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\{")
_MOST_NUMBER_WORDS = 9
_LONGEST_SENTENCE = 200
_LONGEST_DATE = 48
_LONGEST_ANSWER = 1000
"""Characters behind "the answer is" in which it stands."""
_LONGEST_MARK = 64
"""Characters at the end of a prompt that the mark is looked for in."""

_HEADING = re.compile(r"^[ \t]*####[ \t]*(?P<rest>\S.*?)[ \t]*$", re.MULTILINE)
_MARK = re.compile(
    r"""(?ix)
    \b(?: answer | (?:correct|right)\s+(?:option|choice) )\b (?: [\s*_]* (?: (?:is|are|was)\b | [:=] ) | [ *_:]*\n )
    | (?: 答案 | 答え | 解答 | 答 | 정답 | 답 ) [\s*_]* (?: 是 | 为 | 為 | は | 은 | 는 | : )
    | [选選][择擇]? :? (?=\s*\(?[A-J])
    | \b(?: respuesta | réponse | antwort | risposta | resposta | odpowied[zź] | jawaban(?:nya)? | cevap | svar | ответ
        | đáp\ án | câu\ trả\ lời | उत्तर | الجواب | الإجابة | الاجابة )
      (?: \s+(?:final|correcta?|exacte?|finale|final)\b )?
      [\s*_]* (?: (?:es|est|ist|lautet|è|é|to|adalah|är|là|है|هو|هي)(?!\w) | : | - | \u2014 )
    """
)
_LETTER = re.compile(
    r"(?:\\(?:text|mathrm|textbf|mathbf)\{)?\(?(?P<letter>[A-J])\)?\}?(?:\*\*)?(?=$|[.,;:)\]\n]|\s*(?:because|since|as)\b)"
)
_NEGATED = re.compile(
    r"(?i)(?:\b(?:not|never|neither|nor|no longer|rather than|instead of|cannot|none of(?: the)?"
    r"|(?:more|less|fewer|greater|larger|smaller|bigger|higher|lower) than|pas|nicht|non|não|не|không phải|bukan)"
    r"|\\neq?(?![A-Za-z])|[,;(]\s*no|n['\u2019]t(?:\s+(?:think|believe)\s[^.\n]{0,30})?|不是|并非|而非)(?:\s+(?:be|equal(?:\s+to)?))?\s*\W*$"
)
_DENIED_AFTER = re.compile(
    r"(?i)[*_$)\s]*\s(?:is|are|was|were)(?:n['\u2019]t|\s+(?:not|wrong|incorrect|impossible|false))\b"
)
# Numbers of steps, of formulas and of a list's items, and the base of a number, are no answers.
_REFERENCE = re.compile(
    r"(?i)\b(?:steps?|equations?|eqs?\.|figure|fig\.|table|section|theorem|lemma|in\s+base|formula|appendix|chapter)\s*\(?$"
)
_ITEM = re.compile(r"^[ \t*]*(?P<number>\d{1,2})[.)][ \t*]+(?=\S)", re.MULTILINE)
# Between an answer and what it is not: 12, not 13.
_BUT_NOT = re.compile(
    r"[^\w\n]{0,4}(?:(?:and|but|et|und|e|y|và|而|\u0430)\s*)?[^\d\n.]{2,14}"
    r"|,?\s+(?:which|that)\s+(?:is|are|was|were)\s+[^\d\n.]{2,24}"
)
_TO = re.compile(r"\s+to\s+(?=\$?\d)")
# Words for the sign of a number; after another number "minus" is a subtraction.
_NEGATIVE = re.compile(
    r"(?i)\b(?:negative|(?:(?<=is )|(?<=are )|(?<=equals )|(?<=[=:] )|(?<=\A))minus)\s+(?=\$?[\d.]*\d)"
)
_ANSWER_TAG = re.compile(r"<answer>(?P<inside>(?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_IS_THE_ANSWER = re.compile(
    r"[$*_)\]\s]*\s(?:is|are)\s+(?:the|my|our)\s+(?:correct\s+|final\s+|right\s+)*answer\b", re.IGNORECASE
)
# Calculations that GSM8K notes beside the text.
_NOTED = re.compile(r"<<[^<>\n]*>>")
_HTML = re.compile(r"</?(?:b|strong|i|em|u|p|span|div|code|h[1-6])>|<br\s*/?>", re.IGNORECASE)
# Steps of an equation under each other.
_ALIGNED = re.compile(
    r"\\begin\{(?P<kind>(?:align|aligned|gather|gathered|equation|split|multline|eqnarray)\*?)\}(?P<lines>.{0,4000}?)"
    r"\\end\{(?P=kind)\}",
    re.DOTALL,
)
# A JSON text in which a command's backslash was not escaped.
_UNESCAPED = (("\x08oxed", "\\boxed"), ("\x0crac", "\\frac"), ("\text{", "\\text{"), ("\times", "\\times"))
_SAID = r"(?P<said>[^\W\d][\w'-]*(?:\s[\w'-]+){0,2})"
_COPULA = (
    re.compile(
        r"(?i)(?:^|[.!?\n:,]\s*)(?:(?:so|thus|therefore|hence|also|donc),?\s+)?(?:it|this|that|there|es|das|c['\u2019]"
        r"|(?:the|die|der|das|la|le|l['\u2019]|el|il)\s*[\w\s'-]{1,40}?)"
        r"(?:\s*(?:is|are|was|must be|will be|would be|should be|ist|war|est|était|es|è)\b|['\u2019]s\b)"
        rf"\s+{_SAID}(?:,\s+not\s[^.,\n]{{1,40}})?[.!*\s]*$"
    ),
    re.compile(rf"(?:\s(?:\u2014|هي|هو)\s+{_SAID}|(?<!不)(?:是|は)\s*(?P<sign>[^\W\d_]{{1,12}}))[.!。*\s]*$"),
    re.compile(rf"(?i)\b(?:is|are|was|were)\s+(?!not\b|never\b)\w+\s+by\s+{_SAID}[.!*\s]*$"),
    # Jupiter is the largest planet.
    re.compile(
        rf"{_SAID}\s+(?:is|was|are|were)\s+the\s+(?!(?:[\w'-]++\s++)*(?:not|than)\b)[\w'-]++(?:\s++[\w'-]++){{0,11}}+[.!*\s]*$"
    ),
)
_EXPLAINED = re.compile(
    r"""(?ix) \A\s*+ (?P<said>[^\n]{1,64}?) (?: ,?\s++ (?:because|since)\b (?=[^\n]*\Z)
    | [ \t]*+\n [\s*_\#]*+ (?: explanation | reasoning | rationale | justification | because
        | here['\u2019]?s\ (?:why|how) | 解释 | 解析 | 理由 | 说明 | 解説 | 説明 | 설명 | explicación | explication
        | erklärung | begründung | spiegazione | explicação | пояснение | объяснение ) )
    """
)
_RANGE_BEFORE = re.compile(
    r"(?:^|\b(?:is|are|takes?|be|about|around|approximately|roughly)|[:=])[\s*$(]*$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|\*)|\n")
_MOST_WORDS = 3
"""Words of an answer that is neither number nor formula; a longer text is a sentence about something."""


@dataclass(frozen=True)
class FinalAnswer:
    """What a text gives as its answer."""

    text: str
    """As written, without the box or the mark around it."""
    boxed: bool = False
    """Whether a closed box holds it: it is complete even where the text was cut after it."""
    exclaimed: bool = False
    """Whether an exclamation mark follows that ends a sentence, or makes a number a factorial."""


def final_answer(text: str) -> str | None:
    r"""The answer that `text` ends with, tidied, or None where there is none: `\boxed{\$1{,}000}` as 1000."""
    found = find_answer(text)
    return tidy(found.text) if found else None


def find_answer(text: str) -> FinalAnswer | None:
    """The answer that `text` ends with; None where there is none, or where the text ends inside the thinking block."""
    text = plain_thinking(shorter_repeats(text))
    if inside_thinking(text):
        return None
    text = _NOTED.sub("", _turn(text.rpartition(THINK_CLOSE)[2]))
    text = _ALIGNED.sub(lambda match: re.sub(r"&|\\\\", " ", match["lines"]), _HTML.sub("", text))
    for damaged, command in _UNESCAPED:
        text = text.replace(damaged, command)
    tags = list(_ANSWER_TAG.finditer(text))
    if tags and not _BOX.search(text, tags[-1].end()):
        return find_answer(tags[-1]["inside"])
    box = boxed(text)
    if box is not None:
        # A box may hold a sentence: "The answer is 5".
        inner = _marked(tidy(box)) if _MARK.search(box) else None
        return FinalAnswer(inner.text if inner else box, boxed=True) if box.strip() else None
    if _unclosed_box(text):
        return None
    text = re.sub(r"\bper\s+cent\b", "percent", _NEGATIVE.sub("-", plain_characters(text)))
    text = re.sub(r"\+\s?/\s?-(?=\s?\d)", r"\\pm ", text)
    text = re.sub(r"(?<![\d.,/])(\d+)\s+out\s+of\s+(\d+)(?![\d.,/]*\d)", r"\1/\2", text)
    return _marked(text) or _explained(text) or _last_formula(text) or _counted(text) or _short(text)


def plain_thinking(text: str) -> str:
    """`text` with its thinking between `<think>` and `</think>`, whatever marks its model's family writes."""
    text = thinking_in_blocks(text, THINK_OPEN, THINK_CLOSE)
    if not OPENS.search(text) and not CLOSES.search(text):
        return text
    return CLOSES.sub(THINK_CLOSE, OPENS.sub(THINK_OPEN, text))


def inside_thinking(text: str) -> bool:
    """Whether `text` ends inside a thinking block."""
    text = plain_thinking(text)
    opened, closed = text.rfind(THINK_OPEN), text.rfind(THINK_CLOSE)
    return opened > closed and not _is_mentioned(text, opened, closed)


def _is_mentioned(text: str, place: int, closed: int) -> bool:
    """Whether a mark within a line is spoken of: in quotes, or in the answer after a block that ended at `closed`."""
    before = text[:place].rpartition("\n")[2]
    return bool(before.strip()) and (closed >= 0 or before[-1] in "`'\"\u2018\u201c\u00ab(")


def after_thinking(text: str) -> str:
    """What `text` says in its turn after its thinking block, stripped; "" where it ends inside the block."""
    text = plain_thinking(text)
    return "" if inside_thinking(text) else _turn(text.rpartition(THINK_CLOSE)[2]).strip()


def _turn(text: str) -> str:
    """`text` up to the mark of its turn's end: `</s>` where it closes no struck out words."""
    ends = (end.start() for end in _TURN_ENDS.finditer(text) if end[0] != "</s>" or "<s>" not in text[: end.start()])
    return text[: next(ends, len(text))]


def with_opening(prompt: str, answer: str) -> str:
    """`answer`, its thinking in `<think>`, with the opening mark that some templates put at the end of the prompt."""
    prompt, answer = plain_thinking(prompt[-_LONGEST_MARK:]), plain_thinking(answer)
    opened = prompt.rstrip().endswith(THINK_OPEN) and not answer.lstrip().startswith(THINK_OPEN)
    return f"{THINK_OPEN}\n{answer}" if opened else answer


def _unclosed_box(text: str) -> bool:
    return _BOX.search(text) is not None


def _marked(text: str) -> FinalAnswer | None:
    """The last explicit answer: what directly follows a mark, or a heading of GSM8K's form."""
    found: list[tuple[int, FinalAnswer]] = []
    for heading in _HEADING.finditer(text):
        last = not text[heading.end() :].strip()
        content = strip_delimiters(heading["rest"])
        span = _formula_at_start(content)
        if span and (last or not content[span.end :].strip(" .*")):
            found.append((heading.start(), FinalAnswer(content[span.start :].rstrip(" *"))))
        elif last and not _MARK.search(content) and len(content.split()) <= _MOST_WORDS and not list(formulas(content)):
            found.append((heading.start(), FinalAnswer(content)))
    # From the last one: a model may say "the answer is not" a thousand times.
    for mark in reversed(list(_MARK.finditer(text))):
        answer = _after_mark(text[mark.end() : mark.end() + _LONGEST_ANSWER])
        if answer:
            found.append((mark.start(), answer))
            break
    for mark in _IS_THE_ANSWER.finditer(text):
        before = text[max(0, mark.start() - _LONGEST_MARK) : mark.start()]
        said = _formulas_and_dates(before)
        if said and said[-1].end == len(before):
            found.append((mark.start(), FinalAnswer(before[said[-1].start :])))
    return max(found, key=lambda one: one[0])[1] if found else None


def _after_mark(rest: str) -> FinalAnswer | None:
    """The answer that `rest` begins with, None if it begins with a sentence."""
    rest = rest.lstrip(" *_:\"'")
    letter = _LETTER.match(rest)
    if letter:
        return FinalAnswer(letter["letter"])
    span = _formula_at_start(rest)
    if span:
        return _exclaimed(rest, span, alone=False)
    end = _SENTENCE_END.search(rest)
    words = rest[: end.start() if end else None].strip(" *_\"'.`")
    short = words and len(words.split()) <= _MOST_WORDS and not any(c.isdigit() for c in words)
    return FinalAnswer(words) if short or _is_spelled(words) else None


def _explained(text: str) -> FinalAnswer | None:
    """The answer that a text begins with where all else is its explanation: `5, because she had 2 and got 3.`"""
    match = _EXPLAINED.match(text)
    span = _formula_at_start(match["said"]) if match else None
    if not match or not span:
        return None
    rest = match["said"][span.end :]
    alone = len(rest.split()) <= _MOST_WORDS and not any(character.isdigit() for character in rest)
    return FinalAnswer(match["said"][span.start :].rstrip(" *_.,:$")) if alone else None


def _formula_at_start(text: str) -> Span | None:
    date = next(dates(text[:_LONGEST_DATE]), None)
    if date and not text[: date[0]].strip(" *_(\"'"):
        return Span(*date)
    substance = next(chemical_formulas(text[:_LONGEST_DATE]), None)
    if substance and not text[: substance[0]].strip(" *_(\"'$"):
        return Span(*substance)
    found = formulas(text)
    first = next(found, None)
    if first is None:
        return None
    bound = Span(*with_its_words(text, first.start, first.end))
    if text[: bound.start].strip(" *_(\"'"):
        return None
    # 3 to 5 is all of an answer.
    follows = _TO.match(text, first.end)
    second = next(found, None) if follows else None
    return Span(first.start, second.end) if follows and second and second.start == follows.end() else bound


def _last_formula(text: str) -> FinalAnswer | None:
    items = _item_numbers(text)
    found = [one for one in _formulas_and_dates(text) if one.start not in items and not _is_reference(text, one)]
    found = without_circumstances(text, found)
    while len(found) > 1 and CONDITION.fullmatch(text, found[-2].end, found[-1].start):
        found.pop()
    while found and _is_denied(text, found[-1]):
        denied = found.pop()
        if not found or not _BUT_NOT.fullmatch(text, found[-1].end, denied.start):
            return None
    if not found:
        return None
    last = found[-1]
    joint = _TO.match(text, found[-2].end) if len(found) > 1 else None
    if joint and joint.end() == last.start:
        before = text[max(0, found[-2].start - _LONGEST_MARK) : found[-2].start]
        last = Span(found[-2].start, last.end) if _RANGE_BEFORE.search(before) else last
    bound = Span(*with_its_words(text, last.start, last.end))
    return _exclaimed(text, last) if bound == last else FinalAnswer(text[bound.start : bound.end])


def _is_denied(text: str, span: Span) -> bool:
    before = text[max(0, span.start - _LONGEST_SENTENCE) : span.start]
    return _NEGATED.search(before) is not None or _DENIED_AFTER.match(text, span.end) is not None


def _is_reference(text: str, span: Span) -> bool:
    named = _REFERENCE.search(text[max(0, span.start - _LONGEST_MARK) : span.start])
    return named is not None and re.fullmatch(r"\(?\d+(?:\.\d+)*\)?", text[span.start : span.end]) is not None


def _item_numbers(text: str) -> set[int]:
    """Where the numbers of a list's items stand: 1, 2 and so on, each at the beginning of a line."""
    items = list(_ITEM.finditer(text))
    counted = [int(item["number"]) for item in items] == list(range(1, len(items) + 1))
    return {item.start("number") for item in items} if counted and len(items) > 1 else set()


def _formulas_and_dates(text: str) -> list[Span]:
    """Every formula in order, a date as one, and a substance where its sentence has no number: not in 44 g of CO2."""
    days, substances = ([Span(*found) for found in find(text)] for find in (dates, chemical_formulas))
    taken = {place for span in (*days, *substances) for place in range(span.start, span.end)}
    apart = [one for one in formulas(text) if taken.isdisjoint(range(one.start, one.end))]
    numbers = sorted([*apart, *days], key=lambda span: span.start)
    ends = [match.start() for match in _SENTENCE_END.finditer(text)] if substances else []
    counting = {bisect(ends, one.start) for one in numbers}
    alone = [one for one in substances if bisect(ends, one.start) not in counting]
    return sorted([*numbers, *alone], key=lambda span: span.start)


def _exclaimed(text: str, span: Span, *, alone: bool = True) -> FinalAnswer:
    """The answer at `span`, with the exclamation mark behind it where that is a factorial's and ends no sentence.

    Args:
        alone: whether a text that is nothing else is a formula rather than the end of a sentence.
    """
    said, after = text[span.start : span.end], text[span.end + 1 :]
    if text[span.end : span.end + 1] != "!" or said[-1:] not in (*"0123456789n)",):
        return FinalAnswer(said)
    factorial = (alone and text.strip(" *_$.`\n") == f"{said}!") or after[:1] in ("$", "\\", ")", ".")
    return FinalAnswer(f"{said}!" if factorial else said, exclaimed=not factorial)


def _counted(text: str) -> FinalAnswer | None:
    number = last_counted(text) or last_spelled(text)
    return FinalAnswer(number) if number else None


def _short(text: str) -> FinalAnswer | None:
    """A text that is nothing but an answer: `Paris.`, `(B)`."""
    words = text.strip().strip("*_\"'.` ")
    return FinalAnswer(words) if words and (len(words.split()) <= _MOST_WORDS or _is_spelled(words)) else None


def _is_spelled(words: str) -> bool:
    """Whether `words` are one spelled number and perhaps its unit: two and a half hours."""
    if any(character.isdigit() for character in words):
        return False
    return len(words.split()) <= _MOST_NUMBER_WORDS and in_digits(words)[:1].isdigit()


def said_of_it(text: str) -> str | None:
    """What the last sentence says that something is, or of what it speaks, in up to three words: `So it is Monday.`"""
    said = after_thinking(text)
    *anywhere, alone = _COPULA
    matches = (pattern.search(said[-_LONGEST_SENTENCE:]) for pattern in anywhere)
    match = next(filter(None, matches), None)
    match = match or (alone.fullmatch(said) if len(said) <= _LONGEST_SENTENCE else None)
    return next(filter(None, (match["said"], match.groupdict().get("sign"))), None) if match else None
