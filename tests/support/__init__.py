"""What several test files share: cases of families, the slow reference, the loopback Hub, processes."""
