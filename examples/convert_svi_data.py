"""Bring what the authors' scripts preprocessed for SVI-Talk or SVI-Dance into the form that `train_erft.py` reads.

    python examples/convert_svi_data.py --input_dir preprocessed --output_dir talk --caption "a person is talking"

Every folder in `input_dir` is one video. Where it has `video.mp4` and `dwpose.mp4`, these are copied. Else its pickles
are read, `frame_data.pkl` and `audio_embedding.pkl` or `dw_pose_with_foot_wo_face.pkl`, by an unpickler that knows
nothing but dictionaries, bytes, and tensors: a file that asks for anything else is refused, and nothing of it is run.
Pictures are taken over as they are, JPEG by JPEG. What comes out has a list with the columns `file_name`, `text`, and
`audio` or `pose`.
"""

import argparse
import csv
import io
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import torch
from torch._utils import _rebuild_tensor_v2


VIDEO, FRAMES = "video.mp4", "frame_data.pkl"
AUDIO = "audio_embedding.pkl"
POSE_VIDEO, POSES = "dwpose.mp4", "dw_pose_with_foot_wo_face.pkl"


def load_storage(content: bytes) -> Any:
    """What `torch.storage._load_from_bytes` does, which would run what the bytes ask for."""
    return torch.load(io.BytesIO(content), weights_only=True)


# All that a pickled tensor asks for.
KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): load_storage,
    ("collections", "OrderedDict"): OrderedDict,
}


class Restricted(pickle.Unpickler):
    """Reads tensors, and what Python writes without asking for a class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such data needs")
        return KNOWN[module, name]


def read_pickle(path: Path) -> Any:
    """Raises a `ValueError` if the file is damaged, or asks for more than data."""
    try:
        with open(path, "rb") as file:
            return Restricted(file).load()
    except Exception as error:
        raise ValueError(f"{path} is not read: {error}.") from error


def read_pictures(path: Path) -> list[bytes]:
    """JPEG files, one a frame. Raises a `ValueError` if there is anything else."""
    pictures = read_pickle(path)
    if not isinstance(pictures, dict) or not pictures:
        raise ValueError(f"{path} must hold a dictionary of pictures, got {type(pictures).__name__}.")
    for name, picture in pictures.items():
        if not isinstance(picture, bytes) or not picture.startswith(b"\xff\xd8"):
            raise ValueError(f"{path}: {name!r} is no JPEG.")
    return list(pictures.values())


def read_features(path: Path) -> np.ndarray:
    """Rows of audio, `(frames, layers, channels)` float32. Raises a `ValueError` if there is anything else."""
    features = read_pickle(path)
    if not isinstance(features, torch.Tensor) or features.ndim != 3 or not features.is_floating_point():
        raise ValueError(f"{path} must hold a tensor (frames, layers, channels) of floats, got {type(features)}.")
    return features.detach().float().numpy()


def write_video(path: Path, pictures: Iterable[bytes], fps: int) -> None:
    """JPEG files as the frames of a video, bit for bit."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=fps)
        stream.pix_fmt = "yuvj420p"
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.width, stream.height = PIL.Image.open(io.BytesIO(picture)).size
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            packet.time_base = Fraction(1, fps)
            output.mux(packet)


def convert(folder: Path, output_dir: Path, fps: int) -> dict[str, str]:
    """One video and what it follows; the row of the list that tells of them."""
    if (folder / VIDEO).is_file():
        video = f"{folder.name}.mp4"
        shutil.copyfile(folder / VIDEO, output_dir / video)
    else:
        video = f"{folder.name}.mkv"
        write_video(output_dir / video, read_pictures(folder / FRAMES), fps)
    if (folder / AUDIO).is_file():
        np.save(output_dir / f"{folder.name}.npy", read_features(folder / AUDIO), allow_pickle=False)
        return {"file_name": video, "audio": f"{folder.name}.npy"}
    if (folder / POSE_VIDEO).is_file():
        shutil.copyfile(folder / POSE_VIDEO, output_dir / f"{folder.name}-pose.mp4")
        return {"file_name": video, "pose": f"{folder.name}-pose.mp4"}
    pictures = output_dir / f"{folder.name}-pose"
    pictures.mkdir()
    for number, picture in enumerate(read_pictures(folder / POSES)):
        (pictures / f"{number:06}.jpg").write_bytes(picture)
    return {"file_name": video, "pose": pictures.name}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="Folder of preprocessed videos.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where to; it must not be there yet.")
    parser.add_argument("--caption", required=True, help="Of all: the authors' data has one for each kind.")
    parser.add_argument("--fps", type=int, default=25, help="Of the frames in pickles, which do not tell it.")
    args = parser.parse_args(arguments)
    folders = sorted(path for path in args.input_dir.glob("*") if path.is_dir())
    try:
        if not folders:
            raise ValueError(f"`--input_dir`={str(args.input_dir)!r} has no folders, each of which would be a video.")
        if args.output_dir.exists():
            raise ValueError(f"`--output_dir`={str(args.output_dir)!r} is there already: give another one.")
        args.output_dir.mkdir(parents=True)
        rows = [{**convert(folder, args.output_dir, args.fps), "text": args.caption} for folder in folders]
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    with open(args.output_dir / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file_name", "text", *sorted({*rows[0]} - {"file_name", "text"})])
        writer.writeheader()
        writer.writerows(rows)
    print(f"Pickles were read by an unpickler that runs nothing. {len(rows)} videos are in {args.output_dir}.")


if __name__ == "__main__":
    main()
