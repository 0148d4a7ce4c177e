r"""Names of films as VBench-Long reads them: one folder, a film each, `<prompt>-<index>.mp4`.

The index counts the films of a prompt from 0. source: `VBenchLong` in `vbench2_beta_long/__init__.py` and `utils.py`
of the repository Vchitect/VBench (commits 43b208f, 03c285a). Its mode `long_custom_input` takes every `.mp4`, `.avi`
and `.mov` of the folder, and prompts from names; `long_vbench_standard` looks for the prompts of its own suite, so
many films of each as it is told. It splits films by itself, into `split_clip` beside them, so films lie there whole.
The folder is to hold nothing else: the standard mode takes the suffix of whatever is listed first.

    python vbench2_beta_long/eval_long.py --videos_path outputs/drift/vbench/creative-base --mode long_custom_input \
        --dimension imaging_quality aesthetic_quality subject_consistency

is how its own script is called; it was read, not run.
"""

# What cannot stand in a file's name, or where VBench-Long cuts names apart.
_APART = ("/", "\0", "\n", "_", "-Scene", ".mp4")
LONGEST_NAME = 255  # bytes, of most file systems; parts of a film have four more


def film_name(prompt: str, index: int) -> str:
    """What a film is called.

    Raises:
        ValueError: for a prompt that would be read as another one, or is too long for a file's name.
    """
    found = [text for text in _APART if text in prompt]
    if found:
        raise ValueError(
            f"`prompt`={prompt!r} holds {found[0]!r}, with which VBench-Long would read another prompt from the name "
            "of the film. Say it without."
        )
    name = f"{prompt}-{index}.mp4"
    if len(name.encode()) > LONGEST_NAME - len("_000"):
        raise ValueError(
            f"`prompt`={prompt!r} is too long for the name of a film, from which VBench-Long reads it: it has "
            f"{len(name.encode())} bytes, of at most {LONGEST_NAME - len('_000')}. Say it shorter."
        )
    return name
