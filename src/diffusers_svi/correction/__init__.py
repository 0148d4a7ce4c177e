"""Whether a LoRA corrects: what a clip leaves of an error of known kind and size on the clip before."""
