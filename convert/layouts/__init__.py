"""How a design is written into a checkpoint: config, tensor names and shapes."""
