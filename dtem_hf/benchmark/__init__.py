"""Speed: programs that time merged models beside plain ones, and write tables."""
