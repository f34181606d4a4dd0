"""What nobody should pass and everybody will: mutated arguments for operators, mutated files for readers.

`tools/hostile.py` runs both over all packages; a package lists its readers in `tests/hostile_readers.py`.
"""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from core_tensor.app.extras import MissingExtraError
from core_tensor.dev.spoiled_arguments import mutate
from core_tensor.dev.spoiled_files import mutate_file

ALLOWED = (ValueError, TypeError, OSError, MissingExtraError)
"""How bad input may end; it must say something, too."""


class Reader(NamedTuple):
    """A reader of files that somebody else can have written.

    Attributes:
        name: For messages.
        make: Writes a small valid file, or a folder of files, into an empty folder and returns its path.
        read: Reads that path, and uses what it has read.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]


class Failure(NamedTuple):
    """Bad input that did not end in a clear error.

    Attributes:
        name: The reader or operator.
        seed: Repeats the case.
        change: What was mutated.
        error: What came instead of a clear error.
    """

    name: str
    seed: int
    change: str
    error: str

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed} ({self.change}): {self.error}"


def outcome(call: Callable[[], object], seconds: int = 10) -> str | None:
    """Run a call on bad input.

    Args:
        call: The call.
        seconds: How long it may take.

    Returns:
        None where it succeeded or ended in a clear error, else what went wrong.
    """
    try:
        with _time_limit(seconds):
            call()
    except ALLOWED as error:
        return None if str(error).strip() else f"{type(error).__name__} without a message"
    except MemoryError:
        return None
    except RuntimeError as error:  # torch's own way to say that there is too little memory
        return None if "can't allocate memory" in str(error) else f"RuntimeError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


class _TooSlow(BaseException):  # not an Exception: no reader may catch it
    pass


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except _TooSlow:
        raise RuntimeError(f"took more than {seconds} s") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def hostile_files(
    reader: Reader, folder: Path, rounds: int, seed: int, note: Callable[[str], object] = str
) -> Iterator[Failure]:
    """Read mutated copies of a valid file.

    Args:
        reader: The reader.
        folder: An empty folder to work in.
        rounds: Number of mutated copies.
        seed: Of the first copy; the next ones count up.
        note: Is told every case before it runs, should the process not survive it.

    Yields:
        What did not end in success or a clear error.
    """
    origin = folder / "origin"
    origin.mkdir()
    made = reader.make(origin)
    inside = made.relative_to(origin)
    reader.read(_copy(origin, folder / "valid") / inside)  # the valid file reads
    files = sorted(
        path.relative_to(origin) for path in ([made] if made.is_file() else made.rglob("*")) if path.is_file()
    )
    for number in range(seed, seed + rounds):
        rng = random.Random(number)
        copy = _copy(origin, folder / "mutated")
        target = rng.choice(files)
        change = mutate_file(copy / target, rng)
        note(f"{reader.name}, seed {number} ({target}: {change})")
        error = outcome(lambda copy=copy: reader.read(copy / inside))  # type: ignore[misc]
        if error is not None:
            yield Failure(reader.name, number, f"{target}: {change}", error)


def _copy(origin: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(origin, target))


def hostile_calls(
    name: str,
    make: Callable[[random.Random], tuple[Callable[..., object], dict[str, Any]]],
    rounds: int,
    seed: int,
    note: Callable[[str], object] = str,
) -> Iterator[Failure]:
    """Call a function with mutated arguments.

    Args:
        name: The function's name, for messages.
        make: The function and valid arguments by name, drawn at random.
        rounds: Number of calls.
        seed: Of the first call; the next ones count up.
        note: Is told every case before it runs, should the process not survive it.

    Yields:
        What did not end in success or a clear error.
    """
    for number in range(seed, seed + rounds):
        rng = random.Random(number)
        function, arguments = make(rng)
        changes = []
        for _ in range(rng.choice((0, 1, 1, 1, 2)) if number > seed else 0):  # the first call is valid
            key = rng.choice(sorted(arguments))
            arguments[key], change = mutate(arguments[key], rng)
            changes.append(f"{key}: {change}")
        note(f"{name}, seed {number} ({'; '.join(changes)})")
        if not changes:
            function(**arguments)
            continue
        error = outcome(lambda function=function, arguments=arguments: function(**arguments))  # type: ignore[misc]
        if error is not None:
            yield Failure(name, number, "; ".join(changes), error)
