"""What a conversion would do, from config.json and the settings alone."""
