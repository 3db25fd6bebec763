"""What was lost, and what was gained."""
