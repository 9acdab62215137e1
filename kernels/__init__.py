"""One op a file: the torch reference (CPU path and oracle) beside whatever runs faster on a GPU."""
