"""The checkpoint that comes out: files that are whole or not there, and what a resume knows of them."""
