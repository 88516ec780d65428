"""Opening a trace: a sealed file, or journals."""
