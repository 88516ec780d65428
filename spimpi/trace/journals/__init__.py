"""What each rank appends while the run goes on, and how it is read back."""
