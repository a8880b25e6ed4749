"""Everything about running: clock, checkpoints, tracking, progress."""
