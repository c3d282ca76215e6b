"""A regular expression as an automaton that reads each character once: no expression takes it endless time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from deltafmt.errors import UnsupportedError

MAX_STATES: Final = 4096
# Steps after which an expression counts as one that ``re`` would try without end, and steps of all automata of a table.
BACKTRACK_STEPS: Final = 300_000
TOTAL_STEPS: Final = 10_000_000

_CLASSES: Final = "dDwWsS"
_BRACES: Final = re.compile(r"\{(\d*)(,?)(\d*)\}")


@dataclass(slots=True)
class _State:
    """A state of an automaton: the characters that leave it, or the places where it may be left without one.

    Attributes:
        test: an expression for one character; None if no character is read.
        at: ``start`` or ``end`` if the state may be left at the name's start or end alone.
        next: the states that follow, in the order in which ``re`` tries them.
    """

    test: re.Pattern[str] | None = None
    at: str = ""
    next: list[int] = field(default_factory=list)


# A part of an expression: its first state, and its last one, which is left by what is added later.
_Part = tuple[int, int]


class Automaton:
    """A regular expression as states; reads each character of a name once.

    Args:
        expression: the expression, which ``re`` has accepted.
        steps: a list of one number, the steps that this automaton and its neighbours may still take.

    Raises:
        UnsupportedError: the expression has what an automaton cannot say, or is too large.
    """

    def __init__(self, expression: str, steps: list[int] | None = None) -> None:
        self._states: list[_State] = []
        self._steps = [TOTAL_STEPS] if steps is None else steps
        self._tests: dict[str, re.Pattern[str]] = {}
        self._nested = False
        self._checked = 0
        # The sets of states that were met: each one's number, its states, and what follows it on a character.
        self._numbers: dict[frozenset[int], int] = {}
        self._sets: list[frozenset[int]] = []
        self._following: list[dict[str, int]] = []
        self._accepting: dict[tuple[int, bool], bool] = {}
        parser = _Parser(expression, self)
        self._first, self._last = parser.parse()
        self._nested = parser.nested
        self._begin = self._number(self._closure([self._first], start=True))

    def new(self, test: str = "", at: str = "") -> int:
        """Add a state and return its number."""
        if len(self._states) >= MAX_STATES:
            raise UnsupportedError(f"it takes more than {MAX_STATES} states")
        compiled = self._tests.setdefault(test, re.compile(test, re.DOTALL * (test == ""))) if test else None
        self._states.append(_State(compiled, at))
        return len(self._states) - 1

    def join(self, state: int, *following: int) -> None:
        """Let states follow a state."""
        self._states[state].next.extend(following)

    def matches(self, name: str) -> bool:
        """Tell whether ``re.match`` would find the expression at the start of a name.

        Raises:
            UnsupportedError: ``re`` would try the expression without end, or the steps are used up.
        """
        if self._nested and len(name) > self._checked:
            self._checked = len(name)
            self._backtrack(name)
        current = self._begin
        for char in name:
            if self._accepts(current, end=False):
                return True
            following = self._following[current].get(char)
            if following is None:
                following = self._follow(current, char)
            current = following
        return self._accepts(current, end=True)

    def _follow(self, current: int, char: str) -> int:
        """Return the set of states that a character leads to."""
        states = self._states
        reached = [
            after
            for number in self._sets[current]
            if (test := states[number].test) is not None and test.fullmatch(char)
            for after in states[number].next
        ]
        self._spend(len(self._sets[current]))
        found = self._number(self._closure(reached))
        self._following[current][char] = found
        return found

    def _number(self, states: frozenset[int]) -> int:
        found = self._numbers.setdefault(states, len(self._sets))
        if found == len(self._sets):
            self._sets.append(states)
            self._following.append({})
        return found

    def _accepts(self, current: int, *, end: bool) -> bool:
        """Tell whether the expression is found if the name is left here, at its end or before."""
        found = self._accepting.get((current, end))
        if found is None:
            # Only an empty name is at its start and at its end.
            reached = self._closure(self._sets[current], start=current == self._begin, end=True) if end else ()
            found = self._accepting[current, end] = self._last in (reached or self._sets[current])
        return found

    def _closure(self, states: Iterable[int], *, start: bool = False, end: bool = False) -> frozenset[int]:
        """Return the states that are reached without reading a character."""
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found.add(number)
            state = self._states[number]
            if state.test is None and (not state.at or (start if state.at == "start" else end)):
                waiting.extend(state.next)
        self._spend(len(found))
        return frozenset(found)

    def _spend(self, steps: int) -> None:
        self._steps[0] -= steps
        if self._steps[0] < 0:
            raise UnsupportedError(f"matching takes more than {TOTAL_STEPS:,} steps")

    def _backtrack(self, name: str) -> None:
        """Refuse an expression that ``re`` would try without end on a name: follow every way, as ``re`` does."""
        waiting: list[tuple[int, int, frozenset[int]]] = [(self._first, 0, frozenset())]
        for _ in range(BACKTRACK_STEPS):
            if not waiting:
                return
            number, place, empty = waiting.pop()
            if number == self._last:
                return
            state = self._states[number]
            if state.test is not None:
                if place < len(name) and state.test.fullmatch(name[place]):
                    waiting.extend((after, place + 1, frozenset()) for after in reversed(state.next))
            elif number not in empty and (not state.at or place == (0 if state.at == "start" else len(name))):
                waiting.extend((after, place, empty | {number}) for after in reversed(state.next))
        raise UnsupportedError(f"it can be matched in more than {BACKTRACK_STEPS:,} ways, which PEFT would try in turn")


class _Parser:
    """Read an expression into an automaton's states."""

    def __init__(self, text: str, automaton: Automaton) -> None:
        self._text = text
        self._place = 0
        self._automaton = automaton
        self._repeats = 0
        self.nested = False

    def parse(self) -> _Part:
        """Return the part that the whole expression is."""
        part, _ = self._either()
        if self._place < len(self._text):
            raise UnsupportedError(f"{self._text[self._place]!r} stands where nothing may")
        return part

    def _peek(self, count: int = 1) -> str:
        return self._text[self._place : self._place + count]

    def _take(self, count: int = 1) -> str:
        taken = self._peek(count)
        self._place += count
        return taken

    def _either(self) -> tuple[_Part, bool]:
        """Read alternatives; return their part, and True if it repeats something without a limit."""
        part, repeats = self._sequence()
        parts = [part]
        while self._peek() == "|":
            self._take()
            part, more = self._sequence()
            parts.append(part)
            repeats |= more
        if len(parts) == 1:
            return parts[0], repeats
        first, last = self._automaton.new(), self._automaton.new()
        for start, stop in parts:
            self._automaton.join(first, start)
            self._automaton.join(stop, last)
        return (first, last), repeats

    def _sequence(self) -> tuple[_Part, bool]:
        first = last = self._automaton.new()
        repeats = False
        while self._peek() not in ("", "|", ")"):
            (start, stop), more = self._repeated()
            self._automaton.join(last, start)
            last = stop
            repeats |= more
        return (first, last), repeats

    def _repeated(self) -> tuple[_Part, bool]:
        """Read an atom and what says how often it comes."""
        begin = self._place
        part, repeats = self._atom()
        end = self._place
        least, most = self._count()
        if (least, most) == (1, 1):
            return part, repeats
        if self._peek() in ("?", "+"):
            lazy = self._take()
            if lazy == "+":
                raise UnsupportedError("it has a possessive repetition")
        self.nested |= repeats and most is None
        first = self._automaton.new()
        last = first
        # Every copy is read from the text again, which makes states of its own.
        for copy in range(max(least, 1) if most is None else most):
            after = self._place
            if copy:
                self._place = begin
                part, _ = self._atom()
                assert self._place == end
                self._place = after
            start, stop = part
            self._automaton.join(last, start)
            if copy >= least:
                skip = self._automaton.new()
                self._automaton.join(stop, skip)
                self._automaton.join(last, skip)
                stop = skip
            last = stop
            if most is None and copy == max(least, 1) - 1:
                loop = self._automaton.new()
                self._automaton.join(last, loop)
                last = self._automaton.new()
                self._automaton.join(loop, start, last)
        return (first, last), repeats or most is None

    def _count(self) -> tuple[int, int | None]:
        """Read how often an atom comes: the least and the greatest number, None for no limit."""
        sign = self._peek()
        if sign in ("*", "+", "?"):
            self._take()
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        found = _BRACES.match(self._text, self._place) if sign == "{" else None
        if found is None or not (found[1] or found[3]):
            return 1, 1
        self._place = found.end()
        least = int(found[1] or 0)
        most = (int(found[3]) if found[3] else None) if found[2] else least
        if max(least, most or 0) > MAX_STATES:
            raise UnsupportedError(f"it takes more than {MAX_STATES} states")
        return least, most

    def _atom(self) -> tuple[_Part, bool]:
        char = self._take()
        if char == "(":
            if self._peek() == "?":
                kind = re.compile(r"\?(:|P<\w+>)").match(self._text, self._place)
                if kind is None:
                    raise UnsupportedError(f"it has {'(' + self._peek(2)!r}")
                self._place = kind.end()
            part, repeats = self._either()
            self._take()
            return part, repeats
        if char in ("^", "$"):
            return self._place_only("start" if char == "^" else "end"), False
        if char == "\\":
            kind_of = self._take()
            if kind_of in ("A", "Z"):
                return self._place_only("start" if kind_of == "A" else "end"), False
            if kind_of.isalnum() and kind_of not in _CLASSES and kind_of not in "tnrfv":
                raise UnsupportedError(f"it has {char + kind_of!r}")
            return self._one(char + kind_of), False
        if char == "[":
            begin = self._place - 1
            self._place += 1 + (self._peek() == "^")
            while self._peek() not in ("]", ""):
                self._place += 1 + (self._peek() == "\\")
            self._take()
            return self._one(self._text[begin : self._place]), False
        return self._one("." if char == "." else re.escape(char)), False

    def _one(self, test: str) -> _Part:
        state, after = self._automaton.new(test), self._automaton.new()
        self._automaton.join(state, after)
        return state, after

    def _place_only(self, at: str) -> _Part:
        state, after = self._automaton.new(at=at), self._automaton.new()
        self._automaton.join(state, after)
        return state, after
