"""What a run needs around it is looked for before anything is loaded."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_svi.training.environment import check_writable, own_folder


HOLD = """
import os, sys, time
from diffusers_svi.training.environment import own_folder

with own_folder("--output_dir", sys.argv[1]):
    if os.fork():
        print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    """However that ends, and though a process that it started lives on for a while."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, process_group=0
    )
    assert first.stdout.readline() == b"held\n"
    message = re.escape(f"`--output_dir`='{tmp_path}/run' is used by another run")
    with pytest.raises(ValueError, match=message), own_folder("--output_dir", tmp_path / "run"):
        pass
    with own_folder("--output_dir", tmp_path / "other"):
        pass
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    with own_folder("--output_dir", tmp_path / "run"):
        pass
    os.killpg(first.pid, signal.SIGKILL)


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), own_folder("--output_dir", tmp_path):
        raise KeyError
    with own_folder("--output_dir", tmp_path):
        pass


@pytest.mark.parametrize("where", ["file", "file/folder", "/proc/nothing/there"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, where):
    (tmp_path / "file").write_text("")
    folder = tmp_path / where
    with pytest.raises(ValueError, match=re.escape(f"`--output_dir`: nothing can be written to '{folder}'")):
        check_writable("--output_dir", folder)


def test_a_folder_is_made_and_left_as_it_was(tmp_path):
    check_writable("--output_dir", tmp_path / "a" / "b")
    assert not list(Path(tmp_path / "a" / "b").iterdir())
