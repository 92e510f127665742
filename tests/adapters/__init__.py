"""Methods of parameter-efficient fine-tuning, at toy size, held against one sample at a time."""
