r"""What a prompt says: words with weights, and several prompts blended by shares.

The marks are AUTOMATIC1111's (its wiki, "Attention/emphasis"):

    (word)        weight x 1.1, nested as often as wanted
    [word]        weight / 1.1
    (word:1.3)    weight x 1.3
    \( \) \[ \] \| \: \\    the sign itself

and between prompts a bar, with a share behind a colon where they are not equal, as NovelAI's prompt mixing writes it:

    oil painting :2 | ink :1

A bar means nothing else outside brackets and is one key on a phone, while `AND` would take a plain word away. Shares
are StreamDiffusion's prompt list as text, so one setting stays one string for files, `--set`, HTTP, OSC and the page.
Without a bar a colon is a colon. A1111's timed edits `[a:b:0.5]`, `[a|b]`, `AND` and `BREAK` are read as words: they
spread over twenty steps, and a live frame has one to four.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

MOST = 5.0  # weights go from 0 to this
BLENDED = 8  # prompts in a blend; the text model reads each of them
BRACKET = 1.1  # what a pair of brackets without a number does
ENDLESS = 1e30  # where a product of nested weights stops growing, so that none becomes infinite

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
TOKEN = re.compile(
    rf"""\\(?P<literal>[\\()\[\]|:])
      | :\s*(?P<weight>{NUMBER})\s*\)
      | :\s*(?P<share>{NUMBER})\s*(?=\||\Z)
      | (?P<mark>[()\[\]|])
      | [^\\()\[\]|:]+
      | .""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Words of one weight, 0 to `MOST`; 1 is neutral."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """One of the prompts that are blended; the shares of all add up to 1."""

    pieces: tuple[Piece, ...]
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that was read; there is always a part, and a piece in it."""

    parts: tuple[Part, ...]
    note: str = ""  # one line on what was not taken as written

    @property
    def text(self) -> str:
        """Its words without marks."""
        return " ".join("".join(piece.text for piece in part.pieces) for part in self.parts)


def parse(prompt: str) -> Prompt:
    """Read a prompt, whatever it holds: what makes no sense as a mark is text. Linear in its length.

    A bracket that is never closed goes on to the end, as in A1111; one never opened is text.

    >>> parse("a (red:1.3) barn").parts[0].pieces
    (Piece(text='a ', weight=1.0), Piece(text='red', weight=1.3), Piece(text=' barn', weight=1.0))
    >>> [part.share for part in parse("oil painting :3 | ink :1").parts]
    [0.75, 0.25]
    """
    tokens = list(TOKEN.finditer(prompt))
    factors, closing, clamped = _brackets(tokens)
    rounds, squares = [1.0], [1.0]  # products of the brackets around this place
    parts: list[list[Piece]] = [[]]
    shares: list[re.Match[str] | None] = [None]

    def say(text: str) -> None:
        nonlocal clamped
        weight = rounds[-1] * squares[-1]
        clamped = clamped or weight > MOST
        parts[-1].append(Piece(text, min(weight, MOST)))

    for i, token in enumerate(tokens):
        outside = len(rounds) == len(squares) == 1
        if i in factors:
            stack = rounds if token["mark"] == "(" else squares
            stack.append(min(stack[-1] * factors[i], ENDLESS))
        elif i in closing:
            (squares if token["mark"] == "]" else rounds).pop()
        elif token["mark"] == "|" and outside:
            parts.append([])
            shares.append(None)
        elif token["share"] and outside:
            shares[-1] = token
        else:
            say(token["literal"] or token[0])
    if len(parts) == 1 and shares[0]:  # no blend, so the colon was only a colon
        say(shares[0][0])

    note = ""
    if clamped:
        note = f"weights of words go from 0 to {MOST:g}; what the prompt has beyond was taken as that"
    elif len(factors) > len(closing):
        note = "a bracket of the prompt is never closed, so it goes on to the end"
    elif len(parts) > BLENDED:
        note = f"a blend takes {BLENDED} prompts; the rest is left out"
    return Prompt(_blend([_merged(part) for part in parts[:BLENDED]], shares[:BLENDED]), note)


def _brackets(tokens: list[re.Match[str]]) -> tuple[dict[int, float], set[int], bool]:
    """Which tokens open a bracket, with the factor each stands for, which close one, and whether one was clamped."""
    factors: dict[int, float] = {}
    closing: set[int] = set()
    rounds: list[int] = []  # as in A1111 the two kinds do not mind each other
    squares: list[int] = []
    clamped = False
    for i, token in enumerate(tokens):
        if token["mark"] == "(":
            rounds.append(i)
            factors[i] = BRACKET
        elif token["mark"] == "[":
            squares.append(i)
            factors[i] = 1 / BRACKET
        elif token["mark"] == "]" and squares:
            squares.pop()
            closing.add(i)
        elif (token["mark"] == ")" or token["weight"]) and rounds:
            opened = rounds.pop()
            closing.add(i)
            if token["weight"]:
                weight = float(token["weight"])
                factors[opened] = min(max(weight, 0.0), MOST)
                clamped = clamped or weight != factors[opened]
    return factors, closing, clamped


def _merged(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Neighbours of the same weight as one piece, so that neutral marks leave nothing behind."""
    runs = groupby(pieces, key=lambda piece: piece.weight)
    return tuple(Piece("".join(piece.text for piece in run), weight) for weight, run in runs)


def _blend(parts: list[tuple[Piece, ...]], shares: list[re.Match[str] | None]) -> tuple[Part, ...]:
    """The parts that say something, their shares brought to a sum of 1; all zero means equal ones."""
    if len(parts) > 1:
        given = [min(max(float(share["share"]), 0.0), ENDLESS) if share else 1.0 for share in shares]
        found = [
            (part, share) for part, share in zip(parts, given, strict=True) if any(piece.text.strip() for piece in part)
        ]  # a blend that is still being typed has an empty end
        if found:
            total = sum(share for _, share in found)
            return tuple(Part(part, share / total if total else 1 / len(found)) for part, share in found)
    return (Part(parts[0] or (Piece(""),)),)
