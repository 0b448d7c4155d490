"""From one plan to the next: fewer moves, better plans within few moves, and their list."""
