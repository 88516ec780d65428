"""The main job: from a checkpoint to a verdict, on the ranks of a communicator."""
