"""What `rattn.evaluate` measures: losses by window, length, position and recall distance."""
