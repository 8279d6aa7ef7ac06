"""Images and captions, read alike by every program."""
