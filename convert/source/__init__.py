"""The checkpoint that goes in: where it lies, its files, its model one layer at a time, and the text that runs through it."""
