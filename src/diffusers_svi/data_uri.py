"""Pictures as text: PNG in a data URI."""

import base64
import binascii
import io

import PIL.Image


PREFIX = "data:image/png;base64,"
# A picture of 8K in PNG takes about so much; what is longer is none.
MAX_LENGTH = 200 * 2**20


def to_data_uri(image: PIL.Image.Image) -> str:
    """`image` as `"data:image/png;base64,..."`, nothing lost."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    return PREFIX + base64.b64encode(content.getvalue()).decode("ascii")


def from_data_uri(text: str) -> PIL.Image.Image:
    """The picture that `to_data_uri` told. Raises a `ValueError` if `text` tells none."""
    if not text.startswith(PREFIX) or len(text) > MAX_LENGTH:
        raise ValueError(f"{text[:40]!r}... of {len(text)} characters is no picture: it must begin with {PREFIX!r}.")
    try:
        content = base64.b64decode(text[len(PREFIX) :], validate=True)
        image = PIL.Image.open(io.BytesIO(content), formats=["PNG"])
        image.load()
    except (binascii.Error, OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{text[:40]!r}... cannot be read as a picture: {error}") from error
    return image
