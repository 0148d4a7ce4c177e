"""The data of a training run under one name: which videos there are, which can be used, and the samples cut from them.

```python
layout = SampleLayout(num_frames=81, height=480, width=832, fps=16)
videos, skipped = usable_videos(open_folder("my_videos"), layout)
samples = Samples(videos, layout, seed=0)
```
"""

from .frames import Video
from .training.lists import read_captions
from .training.samples import SampleLayout, Samples
from .training.sources import Skipped, open_dataset, open_folder, usable_videos


__all__ = [
    "SampleLayout",
    "Samples",
    "Skipped",
    "Video",
    "open_dataset",
    "open_folder",
    "read_captions",
    "usable_videos",
]
