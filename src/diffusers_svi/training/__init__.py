"""What a training run needs beside its loop: videos and samples of them, encoded once, checkpoints, and its report."""
