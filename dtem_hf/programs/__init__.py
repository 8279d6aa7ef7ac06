"""What all command-line programs share: arguments, and the conditions of a result."""
