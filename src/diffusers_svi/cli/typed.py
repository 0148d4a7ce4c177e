"""Prompts that are typed, or come through a pipe, while a film is made."""

import queue
import shutil
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

import click


try:
    import readline
    import termios
except ImportError:  # not on Windows
    readline = termios = None  # type: ignore[assignment]

SIGN = "> "
ASKED = "What happens in the next clip? An empty line repeats the last prompt, Ctrl-D ends the film."


class Typed:
    """Lines of the standard input, each taken when it is asked for.

    Where a terminal is typed into, lines may be typed ahead of their clips, and what is told meanwhile appears above
    the line that is being typed.

        with Typed(repeats=False) as typed:
            for line in typed: ...

    `watched` tells whether there is such a terminal.

    Args:
        repeats (`bool`): Whether there was a prompt before that an empty line can repeat.
    """

    def __init__(self, repeats: bool):
        self._repeats = repeats
        self.watched = readline is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self._lines: queue.SimpleQueue[str | EOFError | UnicodeDecodeError] = queue.SimpleQueue()
        self._reading = self.watched

    def __enter__(self) -> "Typed":
        if self.watched:
            self._terminal = termios.tcgetattr(sys.stdin)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.watched:
            return
        # The thread may still be in the middle of a line.
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._terminal)
        self._reading, unused = False, []
        while not self._lines.empty():
            unused.append(self._lines.get())
        click.echo()
        for line in unused:
            if isinstance(line, str) and line:
                click.echo(f"Not used: {line}")

    def __iter__(self) -> Iterator[str]:
        for line in self._typed() if self.watched else map(str.strip, sys.stdin):
            if not line and not self._repeats:
                self.tell("There is no prompt yet that an empty line could repeat.")
                continue
            self._repeats = True
            yield line

    def tell(self, message: str) -> None:
        """Write a line; one that is being typed is written again below it."""
        if not self._reading:
            click.echo(message)
            return
        line = SIGN + readline.get_line_buffer()
        above = len(line) // shutil.get_terminal_size().columns
        up = f"\x1b[{above}A" if above else ""
        sys.stdout.write(f"\r{up}\x1b[J{message}\n{line}")
        sys.stdout.flush()

    def _read(self) -> None:
        """In a thread of its own, to the end of the input."""
        while self._reading:
            try:
                self._lines.put(input(SIGN).strip())
            except (EOFError, UnicodeDecodeError) as error:
                self._reading = False
                self._lines.put(error)

    def _typed(self) -> Iterator[str]:
        while True:
            if self._lines.empty():
                self.tell(ASKED)
            line = self._lines.get()
            if isinstance(line, UnicodeDecodeError):
                raise ValueError(f"A prompt that was typed is no text in UTF-8 ({line}). The same command goes on.")
            if isinstance(line, EOFError):
                return
            yield line
