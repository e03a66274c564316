"""The embedded data set: real handwritten digits rendered as lit reliefs, with their true depth."""
