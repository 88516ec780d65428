"""What the checks of one run, or of two, say."""
