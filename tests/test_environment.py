"""What a run needs around it is looked for before anything is loaded."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from diffusers_svi.training.environment import check_file_writable, check_trackers, check_writable, own_folder


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


def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path):
    check_file_writable("--bank_path", tmp_path / "new" / "bank")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "bank").write_text("errors")
    check_file_writable("--bank_path", tmp_path / "bank")
    assert (tmp_path / "bank").read_text() == "errors"


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(f"`--bank_path`: '{tmp_path}/folder' cannot be written")):
        check_file_writable("--bank_path", tmp_path / "folder")
    for where in (tmp_path / "file" / "bank", Path("/proc/nothing/bank")):
        with pytest.raises(ValueError, match=re.escape(f"`--bank_path`: nothing can be written to '{where.parent}'")):
            check_file_writable("--bank_path", where)


def test_trackers_that_are_there_are_taken():
    for name in ("none", "all", "tensorboard"):
        check_trackers(name)


def test_a_tracker_that_is_not_installed_is_refused():
    name = next(name for name in LOGGER_TYPE_TO_CLASS if name not in map(str, get_available_trackers()))
    with pytest.raises(ValueError, match=f"`--report_to {name}` needs {name}, which is not installed: `pip install"):
        check_trackers(name)


def test_a_tracker_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match=r"`--report_to` must be one of .*tensorboard, .*all, none, got 'tensorbord'"):
        check_trackers("tensorbord")
