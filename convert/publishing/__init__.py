"""What leaves the machine: the model card, the upload to the Hub, the file for llama.cpp."""
