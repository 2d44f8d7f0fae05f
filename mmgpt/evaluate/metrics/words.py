"""The words of a caption as COCO's evaluation counts them: Penn Treebank tokens in lower case, without punctuation.

COCO's scripts run Stanford's PTBTokenizer (Java) with -lowerCase and drop sixteen kinds of punctuation. This does the
same in Python: contractions are split ("do n't", "dog 's", "can not"), abbreviations keep their full stop, hyphens,
slashes, times and numbers stay whole. Brackets stay, as "-lrb-": COCO drops "-LRB-" only, after lower case was made.
Tests hold it against the Java program where there is one.
"""

import re

_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_SAME = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "—", "\u00a0": " "})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TWO = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "lemme": "lem me",
    "gimme": "gim me",
    "y'all": "y' all",
    "'tis": "'t is",
    "'twas": "'t was",
}
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|rev|gen|sen|rep|gov|lt|col|sgt|capt|st|ave|blvd|rd|mt|ft|jr|sr|bros|inc|co|corp|ltd|etc|vs|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|approx"
)
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)\S*[^\s.,;:!?)'"]                # an address
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | </?\w[^<>\s]*>                                    # a tag
    | (?:[a-z]\.){{2,}}(?!\w)                           # u.s., p.m.
    | \b(?:{_ABBREVIATIONS})\.
    | \bno\.(?=\s*\d)
    | (?<!\w)[a-z]\.(?!\w)                               # an initial
    | (?<!\w)'(?:n'|tis\b|twas\b)
    | (?<!\w)'\d\ds?\b                                  # '90s
    | \d+(?:[.,:/]\d+)+(?:\w+)?                         # 1,000  5.50  12:30  1/2
    | (?<!\w)\.\d+                                      # .5
    | @\w+
    | \w+(?:[-/._&]\w+|'\w+)*                           # words, joined ones whole
    | \.\.+ | …
    | [!?]{{2,}}                                        # kept: only single ones are dropped
    | --+ | —
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|d|m|ll|re|ve))$")


def words(caption: str) -> list[str]:
    """The tokens of one caption."""
    found: list[str] = []
    for token in map(str.lower, _TOKEN.findall(caption.translate(_SAME))):
        if token in _BRACKETS:
            found.append(_BRACKETS[token])
        elif token not in _DROPPED and not re.fullmatch(r"[\"…—]|\.\.+|--+", token):
            found += _split(token)
    return found


def _split(token: str) -> list[str]:
    """A word with its contractions apart."""
    if token in _TWO:
        return _TWO[token].split()
    tail: list[str] = []
    while (match := _CLITIC.fullmatch(token)) is not None:
        token = match[1]
        tail.insert(0, match[2])
    return [token, *tail]
