import os

import pytest
import torch

from diffusers_svi import ChainState, HeldLatents, LatentMotion, PixelMotion
from diffusers_svi.chain import kept_frames


def make_state(**values) -> ChainState:
    values = {
        "conditioning": PixelMotion(5, "reference"),
        "num_frames": 17,
        "image": torch.rand(1, 3, 8, 8) * 2 - 1,
        "frames": torch.randint(256, (1, 3, 5, 8, 8), dtype=torch.uint8),
        "num_clips": 3,
        "start": 36,
        "continues": True,
        "generator": torch.Generator().manual_seed(0).get_state(),
        **values,
    }
    return ChainState(**values)


LATENT = {"conditioning": LatentMotion(), "frames": None}


def same(one: ChainState, other: ChainState) -> bool:
    fields = one.__dataclass_fields__
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in fields)
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"conditioning": LatentMotion(), "frames": None, "latents": torch.randn(1, 16, 1, 2, 2)},
        {"generator": None},
        {"anchor": torch.rand(1, 3, 8, 8), "start": 7},
        {"num_clips": 0, "start": 0, "continues": False, "frames": None},
    ],
)
def test_save_and_load_give_the_same_state(tmp_path, values):
    state = make_state(**values)
    state.save(tmp_path / "film.state")
    assert same(ChainState.load(tmp_path / "film.state"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["film.state"]


def test_a_failed_save_leaves_the_state_before(tmp_path, monkeypatch):
    path = tmp_path / "film.state"
    before = make_state()
    before.save(path)

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr("diffusers_svi.chain.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        make_state(num_clips=4).save(path)
    assert same(ChainState.load(path), before) and os.listdir(tmp_path) == ["film.state"]


def test_others_may_read_a_state(tmp_path):
    (tmp_path / "other").write_text("")
    make_state().save(tmp_path / "film.state")
    assert (tmp_path / "film.state").stat().st_mode == (tmp_path / "other").stat().st_mode


NAN = torch.full((1, 3, 8, 8), torch.nan)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_clips": -1}, "`num_clips` must be a whole number of 0 to"),
        ({"num_clips": 10**12}, "`num_clips` must be a whole number of 0 to"),
        ({"num_frames": 16}, "clips of `num_frames`=16 cannot be chained"),
        ({"num_frames": 5}, "clips of `num_frames`=5 cannot be chained"),
        ({"image": NAN}, "`image` holds values that are not finite"),
        ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.float64)}, "`image` is .*float64"),
        ({"image": torch.zeros(3, 8, 8)}, "`image` is .*3, 8, 8"),
        ({"image": torch.zeros(1, 3, 0, 8)}, "`image` is .*3, 0, 8"),
        ({"image": torch.full((1, 3, 8, 8), 2.0)}, r"`image` leaves \[-1, 1\]"),
        ({"frames": None}, r"`frames` is None, where \(1, 3, 5, 8, 8\), torch.uint8 belongs"),
        ({"frames": torch.zeros(1, 3, 5, 8, 8)}, "`frames` is .*float32"),
        ({"frames": torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8)}, "`frames` is .*3, 4, 8, 8"),
        ({"num_clips": 0, "continues": False}, "`frames` is .*, where nothing belongs"),
        ({"continues": False}, "`continues` is False after 3 clips"),
        ({"start": -1}, "`start` must be a whole number of 0 to"),
        ({"anchor": torch.zeros(1, 3, 8, 4)}, "`anchor` is .*3, 8, 4"),
        ({"anchor": torch.full((1, 3, 8, 8), -2.0)}, r"`anchor` leaves \[-1, 1\]"),
        ({"latents": torch.zeros(1, 16, 1, 1, 1)}, "`latents` is .*, where nothing belongs"),
        ({"generator": torch.zeros(4)}, "`generator` is .*float32"),
        ({"made_with": {"vae": 3}}, "`made_with` is no dictionary of texts"),
        ({**LATENT, "latents": None}, "`latents` is None, where"),
        ({**LATENT, "latents": torch.zeros(1, 16, 2, 1, 1)}, "`latents` is .*16, 2, 1, 1"),
        ({**LATENT, "latents": torch.full((1, 16, 1, 1, 1), torch.inf)}, "`latents` holds values that are not finite"),
        ({**LATENT, "latents": torch.zeros(1, 16, 1, 1, 2)}, "`latents` are 1 x 2 for an `image` of 8 x 8"),
        ({**LATENT, "latents": torch.zeros(1, 16, 1, 3, 3)}, "`latents` are 3 x 3 for an `image` of 8 x 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_whose_parts_do_not_belong_together(tmp_path, values, message):
    make_state(**values).save(tmp_path / "film.state")
    with pytest.raises(ValueError, match=f"is not a chain state.*{message}"):
        ChainState.load(tmp_path / "film.state")


def test_what_is_no_state_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="missing"):
        ChainState.load(tmp_path / "missing")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match="is not a chain state"):
        ChainState.load(tmp_path / "text")
    torch.save({"image": torch.zeros(1)}, tmp_path / "pickled")
    with pytest.raises(ValueError, match="is not a chain state"):
        ChainState.load(tmp_path / "pickled")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="`format`"):
        ChainState.load(tmp_path / "weights")
    make_state().save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a chain state"):
        ChainState.load(tmp_path / "cut")


@pytest.mark.parametrize(
    ("scheme", "kept"),
    [
        (PixelMotion(1), [(0, 80), (0, 80), (0, 81)]),
        (PixelMotion(5), [(0, 76), (0, 76), (0, 81)]),
        (LatentMotion(1), [(0, 81), (5, 81), (5, 81)]),
        (HeldLatents(0), [(0, 81), (1, 81), (1, 81)]),
    ],
)
def test_what_is_trimmed_where_clips_meet(scheme, kept):
    slices = [kept_frames(scheme, 81, index == 0, index == 2) for index in range(3)]
    assert [(s.start, s.stop) for s in slices] == kept
    state, starts = make_state(conditioning=scheme, num_frames=81, num_clips=0, start=0, continues=False), []
    for _ in range(3):
        starts.append(state.start)
        state = state.after(torch.zeros(1, 16, 21, 1, 1), torch.zeros(1, 3, 81, 8, 8))
    lengths = [stop - start for start, stop in kept]
    assert starts == [0, lengths[0], lengths[0] + lengths[1]]
    assert sum(lengths) == scheme.film_length(3, 81)


def test_what_is_carried():
    video = torch.linspace(-1, 1, 9).view(1, 1, 9, 1, 1).repeat(1, 3, 1, 2, 2)
    latents = torch.arange(5.0, dtype=torch.float64).view(1, 1, 5, 1, 1)
    generator = torch.Generator().manual_seed(3).get_state()

    def after(scheme):
        return make_state(conditioning=scheme).after(latents, video, generator)

    state = after(PixelMotion(2))
    assert state.frames.dtype == torch.uint8 and state.frames[0, 0, :, 0, 0].tolist() == [223, 255]
    assert state.latents is None and state.num_clips == 4 and torch.equal(state.generator, generator)
    state = after(LatentMotion(2))
    assert state.frames is None and state.latents.flatten().tolist() == [3.0, 4.0]
    assert state.latents.dtype == torch.float32
    assert after(HeldLatents(0)).latents is None and make_state().after(latents, video).generator is None


def test_a_state_keeps_no_more_than_what_is_carried():
    """A view would keep the latents of the whole clip."""
    latents = torch.zeros(1, 16, 21, 4, 4)
    state = make_state(conditioning=LatentMotion(1)).after(latents)
    assert state.latents.untyped_storage().nbytes() == 16 * 4 * 4 * 4
    latents += 1
    assert state.latents.abs().max() == 0


def test_what_a_clip_begins_with():
    state = make_state(latents=torch.randn(1, 16, 1, 2, 2))
    carried = state.carried(dtype=torch.float64)
    assert {tensor.dtype for tensor in (carried.image, carried.frames, carried.latents)} == {torch.float64}
    torch.testing.assert_close(carried.frames, state.frames.double() / 255 * 2 - 1, rtol=0, atol=1e-12)
    assert torch.equal(carried.image, state.image.double()) and torch.equal(carried.latents, state.latents.double())
    first = make_state(frames=None).carried()
    assert first.frames is None and first.latents is None
