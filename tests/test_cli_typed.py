"""Prompts typed into a terminal, or coming through a pipe, while the command makes the film."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from diffusers_svi.film import read_clips
from diffusers_svi.journal import Journal
from test_cli import environment, generate


ASKED = "What happens in the next clip?"
QUICK = {"prompt": None, "prompts": "-", "num_clips": None, "num_frames": 9, "num_inference_steps": 2}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "diffusers_svi", *map(str, arguments)]


def prompts(film: Path) -> list[str]:
    return [clip["prompt"] for clip in read_clips(film)]


class Terminal:
    """The command in a terminal of its own: what is typed into it, and what it shows."""

    def __init__(self, folder: Path, *arguments: object, program: list[str] | None = None):
        self.process, self.master = pty.fork()
        if not self.process:
            os.chdir(folder)
            own = {"TERM": "xterm", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8:strict"}
            os.execve(sys.executable, program or command(*arguments), {**environment(), **own})
        self.shown = ""

    def type(self, text: str | bytes) -> None:
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def wait_for(self, pattern: str) -> str:
        """What is shown from now on until the pattern comes."""
        end = time.monotonic() + 300
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            try:
                more = os.read(self.master, 4096) if ready else b""
            except OSError:  # the other end is closed
                more = b""
            assert more, f"{pattern!r} did not come: {self.shown}"
            self.shown += more.decode(errors="replace")
        told, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return told

    def close(self) -> int:
        _, status = os.waitpid(self.process, 0)
        os.close(self.master)
        return os.waitstatus_to_exitcode(status)


def test_prompts_are_typed_into_a_terminal_and_a_line_that_is_being_typed_stays(tmp_path):
    terminal = Terminal(tmp_path, *generate(**QUICK))
    terminal.wait_for(re.escape(ASKED))
    terminal.type("\n")
    terminal.wait_for("no prompt yet that an empty line could repeat")
    terminal.type("a red circle moves left\nit tur")
    told = terminal.wait_for(r"Clip 1 is done: a red circle moves left\r?\n.*> it tur")
    assert "it/s" not in told  # no bar
    terminal.type("ns blue\n")
    terminal.wait_for("Clip 2 is done: it turns blue")
    terminal.type("\n")
    terminal.wait_for("Clip 3 is done: it turns blue")
    terminal.type("\x04")
    terminal.wait_for("film.mp4: 25 frames")
    assert terminal.close() == 0
    assert prompts(tmp_path / "film.mp4") == ["a red circle moves left", "it turns blue", "it turns blue"]


def test_lines_typed_ahead_wait_for_their_clips_and_are_told_when_they_are_not_used(tmp_path):
    terminal = Terminal(tmp_path, *generate(**QUICK | {"num_inference_steps": 20}))
    terminal.wait_for(re.escape(ASKED))
    terminal.type("one\ntwo\nthree\nfour\n")
    terminal.wait_for("Clip 2 is done: two")
    terminal.type("\x03")
    terminal.wait_for(r"Not used: four\r?\n.*The same command goes on with it.")
    assert terminal.close() == 130
    assert prompts(tmp_path / "film.mp4")[:2] == ["one", "two"]


def test_the_terminal_is_as_it_was_when_the_film_ends_while_a_line_is_typed(tmp_path):
    terminal = Terminal(tmp_path, *generate(**QUICK | {"num_clips": 1}))
    before = termios.tcgetattr(terminal.master)
    terminal.wait_for(re.escape(ASKED))
    terminal.type("a red circle moves left\nit tur")
    terminal.wait_for("film.mp4: 9 frames")
    assert termios.tcgetattr(terminal.master) == before
    assert terminal.close() == 0


def test_prompts_come_through_a_pipe_and_a_killed_film_goes_on_with_new_ones(tmp_path):
    """By SIGKILL in the second clip, whose prompt is replayed."""
    film = subprocess.Popen(
        command(*generate(**QUICK | {"num_inference_steps": 20})),
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        text=True,
    )
    film.stdin.write("a red circle moves left\nit turns blue\n")
    film.stdin.flush()
    journal = tmp_path / "film.mp4.journal"
    while not journal.exists() or journal.read_text().count("\n") < 2:
        assert film.poll() is None
        time.sleep(0.01)
    film.send_signal(signal.SIGKILL)
    film.wait()
    assert prompts(tmp_path / "film.mp4") == ["a red circle moves left"]

    told = subprocess.run(
        command(*generate(**QUICK | {"num_inference_steps": 20, "num_clips": 4})),
        cwd=tmp_path,
        env=environment(),
        input="\nit turns red\n",
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0 and "clips 2 to 4" in told.stdout, told.stderr
    used = ["a red circle moves left", "it turns blue", "it turns blue", "it turns red"]
    assert prompts(tmp_path / "film.mp4") == used
    assert [spec.prompt for spec in Journal(journal).entries] == used


def test_what_is_no_text_is_told(tmp_path):
    script = "from diffusers_svi.cli.typed import Typed\nwith Typed(repeats=False) as typed: print(list(typed))"
    terminal = Terminal(tmp_path, program=[sys.executable, "-c", script])
    terminal.wait_for(re.escape(ASKED))
    terminal.type(b"\xff\n")
    terminal.wait_for("ValueError: A prompt that was typed is no text in UTF-8")
    assert terminal.close() == 1


def test_an_input_without_a_prompt_makes_nothing(run_command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, _, errors = run_command(*generate(**QUICK))
    assert status == 1 and "There was no prompt" in errors
    assert not (tmp_path / "film.mp4").exists()
