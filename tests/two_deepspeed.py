"""Runs a script as one of several processes with DeepSpeed on the CPU: `torch.distributed.run THIS STAGE SCRIPT ...`.

Without a GPU accelerate takes a run with DeepSpeed for one process. Here it is told of the others, over gloo.
"""

import os
import runpy
import sys

from accelerate.state import PartialState


if __name__ == "__main__":
    PartialState(cpu=True)
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": sys.argv[1]}
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
