import os
import stat

import pytest

from diffusers_svi.files import written_whole


def test_a_file_is_as_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    with written_whole(tmp_path / "file") as unfinished:
        unfinished.unlink()
        descriptor = os.open(unfinished, os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(descriptor, b"all of it")
        os.close(descriptor)
        assert not (tmp_path / "file").exists()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "other")}
    assert (tmp_path / "file").read_text() == "all of it" and len(modes) == 1


def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(OSError, match="no space"), written_whole(tmp_path / "file") as unfinished:
        unfinished.write_text("half of")
        raise OSError("no space left")
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_kill_left_behind_is_replaced(tmp_path):
    (tmp_path / "file.unfinished").write_text("of a run that was killed")
    with written_whole(tmp_path / "file") as unfinished:
        unfinished.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "new"
