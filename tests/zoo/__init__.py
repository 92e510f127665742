"""Every architecture that transformers can build, at toy size, held against one sample at a time."""
