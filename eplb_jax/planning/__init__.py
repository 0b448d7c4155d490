"""From loads to a plan."""
