"""Images and captions; every program reads them in the same way."""
