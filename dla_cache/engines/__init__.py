"""Where the processes of one build run."""
