"""From one plan to the next."""
