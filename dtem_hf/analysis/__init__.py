"""What merging did, to look at: pictures of merged tokens, and plots of what they cost and save."""
