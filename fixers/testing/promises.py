"""A contract as checks, and what somebody's work breaks of it, in sentences for its author.

A check is a function called ``test_...`` that takes a :class:`Case`: pytest runs it as it is, :func:`broken` without
pytest. The first line of its docstring is what the contract says.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


class ContractError(AssertionError):
    """A promise that isn't kept; the message is a sentence about whose it is."""


class Case:
    """Somebody's work under test.

    Args:
        name: what sentences call it.
        file: where its code is, for the places of errors.
    """

    def __init__(self, name: str, file: str | None = None) -> None:
        self.name = name
        self.file = file

    def expect(self, kept: object, otherwise: str) -> None:
        """Hold it to something.

        Args:
            kept: whether it does what it should.
            otherwise: what it does instead: the sentence "NAME ..." without the name.

        Raises:
            ContractError: it doesn't.
        """
        if not kept:
            raise ContractError(f"{self.name} {otherwise}")

    @contextmanager
    def expect_error(self, kind: type[Exception], otherwise: str, *, saying: str = "") -> Iterator[None]:
        """Hold it to an error of some kind, whose message has some words.

        Raises:
            ContractError: there was none, or it says something else.
        """
        try:
            yield
        except kind as error:
            self.expect(saying in str(error), f"{otherwise} (it says: {error})")
        else:
            self.expect(False, otherwise)


Check = Callable[[Any], None]


def checks_of(module: ModuleType) -> list[Check]:
    """The checks of a contract, in the order in which they are written."""
    return [value for name, value in vars(module).items() if name.startswith("test_")]


def broken(checks: Sequence[Check], case: Case) -> list[str]:
    """What a case breaks: a sentence per promise, and one for several that break in the same way."""
    sentences: dict[str, str] = {}
    for check in checks:
        try:
            check(case)
        except ContractError as error:
            told = str(error)
        # Whatever somebody's code may raise.
        except Exception as error:
            told = f"{case.name} {_raised(error, case.file)}"
        else:
            continue
        promise = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
        sentences.setdefault(told, f"The contract says that {promise[0].lower()}{promise[1:]}, but {told.rstrip('.')}.")
    return list(sentences.values())


def _raised(error: Exception, file: str | None) -> str:
    """What was raised, and the last line of the author's that led to it."""
    message = (str(error).strip().splitlines() or [""])[0]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" ({Path(str(file)).name}, line {lines[-1]})" if lines else ""
    return f"raised {type(error).__name__}{message and ': '}{message.rstrip('.')}{place}"
