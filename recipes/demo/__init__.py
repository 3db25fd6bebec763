"""The demo: a small multi-head Llama trained on the source of Python's standard library."""
